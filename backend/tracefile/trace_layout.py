"""Where everything lies inside a trace file: the one module that knows the HDF5 paths, for the reader and the writer alike.

`backend/FORMAT.md` is the normative text; `tests/test_trace_format.py` holds the two against each other.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from typing import Any

import h5py
import numpy as np

from backend.errors import LayerscopeError
from backend.sites import SITES

FORMAT = "layerscope-trace"
VERSION = 2  # 1: every attention map in tiles
SUFFIX = ".h5"
PART_SUFFIX = ".h5.part"

ID_PATTERN = re.compile(r"[0-9a-z_]{8,64}")

# Positions in one chunk; a piece of a prompt, as the engines cut it, is a multiple.
MAX_CHUNK_ROWS = 512
# Bytes of a chunk: four blocks of Zstandard, few enough that a layer's values are encoded on several cores.
_CHUNK_BYTES = 1 << 19
PACKED = "packed"  # attribute of an attention map of which only the cells up to the diagonal are stored

_SPECIAL_PATHS = {"embed": "embeddings/input_embeddings", "ln_final_out": "embeddings/output_embeddings", "logits": "logits/full"}
NATIVE_GROUP = "native"
_LAYER_GROUP = re.compile(r"layer_(\d{2,5})")


def new_id() -> str:
    """A fresh trace id: 20 lower-case hex digits, unguessable."""
    return secrets.token_hex(10)


def check_id(trace_id: str) -> str:
    """Return the id unchanged, or raise LayerscopeError before anything is done with it."""
    if not isinstance(trace_id, str) or not ID_PATTERN.fullmatch(trace_id):
        raise LayerscopeError(f"{str(trace_id)[:80]!r} is not a trace id; ids are 8 to 64 characters of 0-9, a-z and _.")
    return trace_id


def site_path(site: str, layer: int | None) -> str:
    """The dataset that holds one layer of a site.

    >>> site_path("attn_pattern", 3), site_path("embed", None)
    ('activations/layer_03/attn_pattern', 'embeddings/input_embeddings')
    """
    if not SITES[site].per_layer:
        return _SPECIAL_PATHS[site]
    return f"activations/layer_{layer:02d}/{site}"


def stored_sites(file: h5py.File) -> dict[str, list[int]]:
    """Site -> layers stored in the file ([] for a site without layers), in the order of the vocabulary."""
    found: dict[str, list[int]] = {}
    for group_name, group in file.get("activations", {}).items():
        match = _LAYER_GROUP.fullmatch(group_name)
        if match is None:
            continue
        for site in group:
            found.setdefault(site, []).append(int(match[1]))
    for site, path in _SPECIAL_PATHS.items():
        if path in file:
            found[site] = []
    return {site: sorted(found[site]) for site in SITES if site in found}


def write_json(group: h5py.Group, name: str, value: Any) -> None:
    """Store a JSON value as UTF-8 bytes: HDF5 strings end at a NUL, which token texts may hold."""
    data = json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    dataset = group.create_dataset(name, data=np.frombuffer(data, dtype=np.uint8))
    dataset.attrs["encoding"] = "json"


def read_json(group: h5py.Group, name: str, default: Any = None) -> Any:
    return json.loads(group[name][:].tobytes()) if name in group else default


def chunk_shape(dims: tuple[str, ...], shape: tuple[int, ...], itemsize: int, single_heads: bool = False) -> tuple[int, ...]:
    """A few small heads or a tile of a large one of an attention map, a run of positions of everything else.

    Small heads share a chunk because Zstandard works on blocks of 128 KiB: in smaller chunks the exponents and the mantissas of
    the values fall into one block and are compressed worse. `single_heads`: only some heads are stored, each on its own.
    Runs of a long prompt are a power of two, so that the pieces in which it is computed consist of whole chunks.
    """
    if dims[0] == "head":
        tile = (min(shape[1], MAX_CHUNK_ROWS), min(shape[2], 2 * MAX_CHUNK_ROWS)) if len(shape) == 3 else shape[1:]
        together = 1 if single_heads else max(1, min(shape[0], _CHUNK_BYTES // (itemsize * math.prod(tile))))
        return (together, *tile)
    row_bytes = itemsize * math.prod(shape[1:])
    fitting = max(1, _CHUNK_BYTES // max(row_bytes, 1))
    return (min(shape[0], MAX_CHUNK_ROWS, 1 << (fitting.bit_length() - 1)), *shape[1:])
