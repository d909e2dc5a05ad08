"""What one run does at each node: read its values, bring them into the site's dims, edit them, put them back, hand them out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.engines import Piece, Request, ShouldStop, Sink
from backend.engines.ggml import Tensor, read, view, write
from backend.engines.gguf_graph import Place, Where
from backend.errors import Cancelled
from backend.intervention import Intervention, apply
from backend.model_info import ModelInfo
from backend.sites import SITES

_ROTARY_SITES = ("q", "k", "rot_q", "rot_k")


class Tap:
    """Visits the nodes of one run. `start` is the position of the first token of the piece that is being decoded.

    What is only handed out is handed out where it lies; what is edited is read, changed and put back.
    """

    def __init__(
        self,
        info: ModelInfo,
        rotary_interleaved: bool,
        window_period: int,
        request: Request,
        sink: Sink,
        edits: dict[Where, list[Intervention]],
        should_stop: ShouldStop,
        n_tokens: int,
    ) -> None:
        self.info, self.rotary_interleaved, self.window_period = info, rotary_interleaved, window_period
        self.request, self.sink, self.edits, self.should_stop, self.n_tokens = request, sink, edits, should_stop, n_tokens
        self.start = 0

    def visit(self, tensor: Tensor, place: Place) -> None:
        """Edit, then hand out. Raises Cancelled at the end of a layer when the run is to stop."""
        edits = self.edits.get((place.site, place.layer), ())
        wanted = self.request.wants(place.site, place.layer)
        if edits:
            node = read(tensor)
            values, owned = self._edited(_part_of(node, place), place, edits), True
            write(tensor, node)
        elif wanted:
            node, owned = view(tensor)
            values = self._edited(_part_of(node, place), place, ())
            owned = owned or not np.may_share_memory(values, node)
        if wanted:
            self.sink(Piece(place.site, place.layer, self.start, values, place.source, owned))
        if place.site == "resid_post" and self.should_stop():
            raise Cancelled

    def _edited(self, node: NDArray[Any], place: Place, edits: Sequence[Intervention]) -> NDArray[Any]:
        """The site's values after every edit; `node` holds them too then, in ggml's own layout."""
        if SITES[place.site].is_attention_map:
            return self._edited_map(node, place, edits)
        values = self._from_node(node, place.site)
        if place.scale != 1.0:
            values = values * np.float32(place.scale)
        for edit in edits:
            values = apply(edit, values, self.start, self.n_tokens)
        if edits:
            stored = values if place.scale == 1.0 else values / np.float32(place.scale)
            node[...] = self._to_node(stored, place.site).reshape(node.shape)
        return values

    def _edited_map(self, node: NDArray[Any], place: Place, edits: Sequence[Intervention]) -> NDArray[Any]:
        """Attention maps. ggml: (1, head, n, keys padded); ours: (head, n, start + n). kq is neither scaled nor masked yet."""
        n = node.shape[2]
        inside = node[0, :, :, : self.start + n]
        if place.site == "attn_pattern":
            values = inside
            for edit in edits:
                values = apply(edit, values, self.start, self.n_tokens)
            if edits:
                inside[...] = values
            return values
        hidden = self._hidden(n, place.layer or 0)
        values = np.where(hidden, -np.inf, inside * np.float32(place.scale)).astype(np.float32)
        for edit in edits:
            # The mask is added after this node and cannot be edited away here; say so in what is handed out.
            values = np.where(hidden, -np.inf, apply(edit, values, self.start, self.n_tokens)).astype(np.float32)
        if edits:
            inside[...] = np.where(hidden, inside, values / np.float32(place.scale))
        return values

    def _hidden(self, n: int, layer: int) -> NDArray[np.bool_]:
        """(n, start + n) True where the mask forbids attention: later keys, and keys before the layer's sliding window."""
        distance = self.start + np.arange(n)[:, None] - np.arange(self.start + n)
        windowed = self.window_period and self.info.sliding_window and layer % self.window_period != self.window_period - 1
        return (distance < 0) | (distance >= self.info.sliding_window) if windowed else distance < 0

    def _from_node(self, node: NDArray[Any], site: str) -> NDArray[Any]:
        """ggml's 4 axes -> the site's dims. Positions are the slowest axis of every site that is no attention map."""
        sizes = [self.info.dims[dim] for dim in SITES[site].dims[1:]]
        values = np.ascontiguousarray(node).reshape(-1, *sizes)
        if self.rotary_interleaved and site in _ROTARY_SITES:
            # ggml's pairs (2i, 2i + 1) -> the checkpoint's (i, i + d_head / 2)
            values = values.reshape(*values.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(values.shape)
        return values

    def _to_node(self, values: NDArray[Any], site: str) -> NDArray[Any]:
        if self.rotary_interleaved and site in _ROTARY_SITES:
            return values.reshape(*values.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(values.shape)
        return values


def _part_of(node: NDArray[Any], place: Place) -> NDArray[Any]:
    """A view of the part of the node that the site is: one half of a fused product, or all of it."""
    if not place.part:
        return node
    i, n = place.part
    width = node.shape[-1] // n
    return node[..., i * width : (i + 1) * width]
