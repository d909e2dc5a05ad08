"""Trace: the lazy reader of a trace file. Names and shapes first, bytes on slicing; derived sites are computed on reading.

A trace is immutable: everything here only reads. `backend/FORMAT.md` says what lies where.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin  # noqa: F401  registers the Zstandard filter with HDF5
import numpy as np
from numpy.typing import NDArray

from backend.analysis.moe import Routing
from backend.errors import LayerscopeError, SiteNotCaptured
from backend.model_info import ModelInfo
from backend.sites import NATIVE, SITES, resolve_site
from backend.tracefile.half_precision import from_float16
from backend.tracefile.packed_maps import unpack
from backend.tracefile.trace_layout import FORMAT, NATIVE_GROUP, PACKED, VERSION, read_json, site_path, stored_sites
from backend.weight_names import GGUF_NAMES, HF_NAMES

_W_O = "blocks.{}.attn.W_O"  # an architecture without a row has no matrix of this name

Array = NDArray[Any]

# Sites that follow from others by the identities of a residual block, tried in order when they are not stored.
_SUMS: dict[str, tuple[tuple[str, str, int], ...]] = {
    "attn_out": (("resid_mid", "resid_pre", -1),),
    "mlp_out": (("resid_post", "resid_mid", -1),),
    "resid_mid": (("resid_pre", "attn_out", +1), ("resid_post", "mlp_out", -1)),
}


# A map of all heads that is larger is read head by head: it grows with the square of the prompt.
_MAP_BYTES = 4 << 30


def open_trace(path: str | Path) -> Trace:
    """Open a published trace file. Raises LayerscopeError if it is missing or not a trace of this version."""
    return Trace(Path(path))


class Trace:
    """One captured run. Use as a context manager, or close() when done; reads are safe from several threads.

    `trace["attn_pattern", 3]` is a float32 array (head, q_pos, k_pos); dims of every site are in `backend.sites`.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise LayerscopeError(f"There is no trace at {self.path}.")
        try:
            self._file = h5py.File(self.path, "r", locking=False)
        except OSError as error:
            raise LayerscopeError(f"{self.path.name} is not a readable HDF5 file ({str(error).split('(')[0].strip()}).") from None
        attrs = self._file.attrs
        if attrs.get("format") != FORMAT or not attrs.get("complete"):
            self._file.close()
            raise LayerscopeError(f"{self.path.name} is not a finished Layerscope trace.")
        version = int(attrs["version"])
        if version > VERSION:
            self._file.close()
            raise LayerscopeError(f"{self.path.name} has trace format {version}; this Layerscope reads up to {VERSION}.")
        self.id: str = str(attrs["id"])
        self.created_at: str = str(attrs["created_at"])
        self.engine: str = str(attrs["engine"])
        self.engine_version: str = str(attrs["engine_version"])
        self.category: str = str(attrs.get("category", ""))
        meta = self._file["metadata"]
        self.info = ModelInfo.from_json(read_json(meta, "model"))
        self.tags: list[str] = read_json(meta, "tags", [])
        self.prompt: str = read_json(meta, "prompt", "")
        self.response: str = read_json(meta, "response", "")
        self.integrity: dict[str, dict[str, Any]] = read_json(meta, "integrity", {})
        tokens = self._file["tokens"]
        self.token_ids: list[int] = [int(i) for i in tokens["ids"][:]]
        self.token_texts: list[str] = read_json(tokens, "texts")
        self.n_prompt: int = int(tokens.attrs["n_prompt"])
        self.special: set[int] = {int(p) for p in tokens["special"][:]}
        self.stored: dict[str, list[int]] = stored_sites(self._file)

    # -- what there is ---------------------------------------------------------------------------------------------------

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)

    @functools.cached_property
    def metadata(self) -> dict[str, Any]:
        """generation, interventions, timings, capture settings, command and notes of the run."""
        group, names = self._file["metadata"], ("generation", "interventions", "timings", "capture", "command", "notes")
        return {name: read_json(group, name) for name in names if name in group}

    def layers(self, site: str) -> list[int]:
        """Layers at which a site can be read, derived ones included; [] for a site without layers or one that is not there."""
        name = resolve_site(site)[0]
        if not SITES[name].per_layer:
            return []
        return [layer for layer in range(self.info.n_layers) if self.has(name, layer)]

    def has(self, site: str, layer: int | None = None) -> bool:
        """True if the site can be read (at that layer, or at any layer if none is named), or "native:NAME" is in the file."""
        if site.startswith(NATIVE):
            return site.removeprefix(NATIVE) in self._natives
        name, named = resolve_site(site)
        layer = named if named is not None else layer
        if layer is None and SITES[name].per_layer:
            return any(self._can_read(name, each, ()) for each in range(self.info.n_layers))
        return self._can_read(name, layer, ())

    def __contains__(self, key: str | tuple[str, int]) -> bool:
        site, layer = key if isinstance(key, tuple) else (key, None)
        return self.has(site, layer)

    # -- arrays ------------------------------------------------------------------------------------------------------------

    def __getitem__(self, key: str | tuple[str, int]) -> Array:
        """The values of a site at a layer, float32 (int32 for expert_indices) in the site's dims; trace["native:NAME"] is a native tensor.

        Attention maps of which only some heads or rows were captured are NaN elsewhere. Raises SiteNotCaptured if the trace
        holds neither the site nor what it can be derived from.
        """
        site, layer = key if isinstance(key, tuple) else (key, None)
        if site.startswith(NATIVE):
            return self.native_tensor(site.removeprefix(NATIVE))
        name, named = resolve_site(site)
        layer = named if named is not None else layer
        if SITES[name].per_layer and layer is None:
            raise LayerscopeError(f"Site {name!r} has one array a layer; ask for trace[{name!r}, layer].")
        return self._read(name, layer if SITES[name].per_layer else None)

    def position(self, site: str, layer: int | None, at: int | slice) -> NDArray[np.float32]:
        """A site's values at one position, without the axis pos, or at a slice of them; the others are not converted. Not for attention maps."""
        if self._is_stored(site, layer):
            return np.asarray(self._dataset(site, layer)[at], dtype=np.float32)
        return np.asarray(self._read(site, layer)[at], dtype=np.float32)

    def head(self, site: str, layer: int, head: int, q: slice = slice(None), k: slice = slice(None)) -> NDArray[np.float32]:
        """One head of an attention map, (q_pos, k_pos), read without the other heads; `q` and `k` cut a tile out of it."""
        name, named = resolve_site(site)
        layer = named if named is not None else layer
        dataset = self._dataset(name, layer)
        if not 0 <= head < dataset.shape[0]:
            raise LayerscopeError(f"Head {head} is outside 0-{dataset.shape[0] - 1}.")
        heads, rows = self.kept(name, layer)
        if head not in heads:
            raise LayerscopeError(f"Head {layer}.{head} was not captured; of layer {layer} the trace holds {', '.join(f'{layer}.{h}' for h in heads)}.")
        packed = PACKED in dataset.attrs
        stored = dataset[head] if packed else dataset[head, q, k]
        values = from_float16(stored) if stored.dtype == np.float16 else np.asarray(stored, np.float32)
        if packed:
            values = unpack(values, self.n_tokens, dataset.fillvalue)[q, k]
        if rows != (0, self.n_tokens):
            at = np.arange(self.n_tokens)[q]
            values[(at < rows[0]) | (at >= rows[1])] = np.nan
        return values

    def kept(self, site: str, layer: int | None) -> tuple[list[int], tuple[int, int]]:
        """Of an attention map: the heads, and the query positions (first to before last), that were captured."""
        name, named = resolve_site(site)
        dataset = self._dataset(name, named if named is not None else layer)
        if "kept" not in dataset.attrs:
            return list(range(dataset.shape[0])), (0, self.n_tokens)
        kept = json.loads(dataset.attrs["kept"])
        return kept["heads"], tuple(kept["rows"])

    @functools.cached_property
    def _natives(self) -> dict[str, str]:
        """Native name -> its dataset."""
        return {str(item.attrs["name"]): f"{NATIVE_GROUP}/{at}" for at, item in self._file.get(NATIVE_GROUP, {}).items()}

    @property
    def native(self) -> list[str]:
        """Names of the native tensors in the file, as they were asked for."""
        return list(self._natives)

    def native_tensor(self, name: str) -> Array:
        """A native tensor, float32 or int32, all its axes as the engine has them. Raises SiteNotCaptured naming those there are."""
        if name not in self._natives:
            raise SiteNotCaptured(f"{NATIVE}{name}", None, [f"{NATIVE}{known}" for known in self.native])
        return self._file[self._natives[name]][...]

    def routing(self, layer: int) -> Routing:
        """What the router of one layer decided, with what was captured of it; `counts` says how often each expert was chosen.

        Raises SiteNotCaptured where the layer's expert_indices are not in the trace, LayerscopeError for a model without experts.
        """
        if not self.info.is_moe:
            raise LayerscopeError(f"{self.info.name} is dense: it has no experts and no routing.")
        rest = {name: self._read(site, layer) if self._is_stored(site, layer) else None
                for name, site in (("weights", "expert_weights"), ("probs", "router_probs"), ("logits", "router_logits"))}  # fmt: skip
        if rest["probs"] is not None:  # an expert that an edit took out of the choice has probability 0
            rest["probs"] = np.where(np.isneginf(rest["probs"]), np.float32(0), rest["probs"])
        return Routing(layer, self.info.n_experts, self._read("expert_indices", layer), **rest)

    def source(self, site: str, layer: int | None = None) -> str:
        """The native tensor or module that a stored site came from."""
        source = self._dataset(site, layer).attrs["source"]
        return source.decode() if isinstance(source, bytes) else str(source)

    def _dataset(self, site: str, layer: int | None) -> h5py.Dataset:
        path = site_path(site, layer)
        if path not in self._file:
            raise SiteNotCaptured(site, layer if site in self.stored else None, self.stored, self.stored.get(site, ()))
        return self._file[path]

    def _is_stored(self, site: str, layer: int | None) -> bool:
        return layer in self.stored.get(site, ()) if SITES[site].per_layer else site in self.stored

    def _can_read(self, site: str, layer: int | None, seen: tuple[str, ...]) -> bool:
        if self._is_stored(site, layer):
            return True
        if layer is None or site in seen or not 0 <= layer < self.info.n_layers:
            return False
        if site == "resid_pre":
            return self._is_stored("resid_post", layer - 1) if layer else "embed" in self.stored
        if site == "result":
            return self._is_stored("z", layer) and _W_O in (HF_NAMES if self.engine == "hf" else GGUF_NAMES).get(self.info.architecture, {})
        return any(self._can_read(a, layer, (*seen, site)) and self._can_read(b, layer, (*seen, site)) for a, b, _ in _SUMS.get(site, ()))

    def _read(self, site: str, layer: int | None, seen: tuple[str, ...] = ()) -> Array:
        if self._is_stored(site, layer):
            if SITES[site].is_attention_map and layer is not None:
                return self._whole_map(site, layer)
            values = self._dataset(site, layer)[...]
            return values if values.dtype.kind == "i" else np.asarray(values, dtype=np.float32)
        if layer is not None and self._can_read(site, layer, ()):
            if site == "resid_pre":
                return self._read("resid_post", layer - 1) if layer else self._read("embed", None)
            if site == "result":
                return self._head_results(layer)
            for a, b, sign in _SUMS[site]:
                if self._can_read(a, layer, (*seen, site)) and self._can_read(b, layer, (*seen, site)):
                    return self._read(a, layer, (*seen, site)) + sign * self._read(b, layer, (*seen, site))
        raise SiteNotCaptured(site, layer if site in self.stored else None, self.stored, self.stored.get(site, ()))

    def _whole_map(self, site: str, layer: int) -> NDArray[np.float32]:
        """Every head of an attention map; NaN where it was not captured."""
        shape = (len(self._dataset(site, layer)), self.n_tokens, self.n_tokens)
        if 4 * math.prod(shape) > _MAP_BYTES:
            raise LayerscopeError(f"{site} of layer {layer} takes {4 * math.prod(shape) / 1e9:.1f} GB, the limit is {_MAP_BYTES / 1e9:.1f}; read single heads with trace.head.")
        whole = np.full(shape, np.nan, np.float32)
        for head in self.kept(site, layer)[0]:
            whole[head] = self.head(site, layer, head)
        return whole

    def _head_results(self, layer: int) -> NDArray[np.float32]:
        """Per-head outputs z W_O, (pos, head, d_model); W_O is read from the model's own file.

        Their sum over heads is the product with W_O alone: attn_out without the bias b_O where there is one, before the norm that
        follows W_O in gemma2, gemma3 and olmo2, and before the multiplier of granite.
        """
        from backend.weights import open_weights  # only here: a trace is otherwise independent of its model

        z = self._read("z", layer)
        w_o = open_weights(self.info.source)[f"blocks.{layer}.attn.W_O"]  # (d_model, head * d_head)
        return np.einsum("phd,mhd->phm", z, w_o.reshape(w_o.shape[0], z.shape[1], z.shape[2]), optimize=True).astype(np.float32)

    # -- logits ------------------------------------------------------------------------------------------------------------

    @property
    def top_ids(self) -> NDArray[np.int32]:
        """(pos, k) token ids, most probable first."""
        return self._file["logits/top_ids"][:]

    @property
    def top_logprobs(self) -> NDArray[np.float32]:
        """(pos, k) natural-log probabilities of `top_ids`."""
        return self._file["logits/top_logprobs"][:]

    @property
    def logsumexp(self) -> NDArray[np.float32]:
        """(pos,) log of the softmax denominator, nats."""
        return self._file["logits/logsumexp"][:]

    @property
    def next_logprobs(self) -> NDArray[np.float32]:
        """(pos,) log-prob, nats, that position i gave to the token at i + 1; NaN at the last position."""
        return self._file["logits/next_logprobs"][:]

    @property
    def next_ranks(self) -> NDArray[np.int32]:
        """(pos,) rank (0 = best) that position i gave to the token at i + 1; -1 at the last position."""
        return self._file["logits/next_ranks"][:]

    @property
    def entropy(self) -> NDArray[np.float32]:
        """(pos,) entropy of the next-token distribution, nats."""
        return self._file["logits/entropy"][:]

    @functools.cached_property
    def _vocabulary(self) -> dict[int, str]:
        group = self._file["vocabulary"]
        return dict(zip((int(i) for i in group["ids"][:]), read_json(group, "texts"), strict=True))

    @property
    def vocabulary(self) -> dict[int, str]:
        """Texts of the tokens that occur anywhere in this trace, as inputs or among the stored predictions."""
        return dict(self._vocabulary)

    def token_text(self, token_id: int) -> str:
        """Text of a token id that occurs anywhere in this trace; "‹id 123›" for one that does not."""
        return self._vocabulary.get(int(token_id), f"‹id {int(token_id)}›")

    # -- what experiments computed ------------------------------------------------------------------------------------------

    @property
    def results(self) -> list[str]:
        return sorted(self._file.get("results", ()))

    def result(self, name: str) -> Array:
        """A stored result; raises SiteNotCaptured naming those there are."""
        if name not in self._file.get("results", ()):
            raise SiteNotCaptured(name, None, self.results)
        return self._file["results"][name][...]

    def result_attrs(self, name: str) -> dict[str, Any]:
        """Axis names (`dims`) and labels that belong to a result."""
        if name not in self._file.get("results", ()):
            raise SiteNotCaptured(name, None, self.results)
        return json.loads(self._file["results"][name].attrs["labels"])

    # -- life ----------------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[tuple[str, int | None]]:
        """(site, layer) of everything stored."""
        for site, layers in self.stored.items():
            yield from ((site, layer) for layer in layers) if SITES[site].per_layer else ((site, None),)

    def __repr__(self) -> str:
        return f"<Trace {self.id}: {self.info.name}, {self.n_tokens} tokens, {len(self.stored)} sites>"


TraceOpener = Callable[[str], Trace]
