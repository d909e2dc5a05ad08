"""Makes a quantized variant of a model with llama.cpp's own quantizer, so that it is what a user's own quantized file is.

The source is a GGUF file in F32, F16 or BF16, or a Hugging Face folder that `backend.files.gguf_writer` can write. For the command line and
the Python API: llama.cpp reads the whole file here.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from backend.durable import publish
from backend.engines import default_threads
from backend.engines.ggml import first_error, forget_errors, open_llama
from backend.errors import LayerscopeError
from backend.files.ggml_types import FILE_TYPES
from backend.files.gguf_header import read_header
from backend.files.imatrix import read_imatrix

# What llama.cpp's quantizer has no code for, though it runs such files.
NOT_WRITTEN = frozenset({"NVFP4"})
# Types that some tensor of goes wrong without an importance matrix: tensor_requires_imatrix in llama.cpp's src/llama-quant.cpp.
NEED_IMATRIX = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S"})
TYPES: Mapping[str, int] = {name: number for number, name in FILE_TYPES.items() if name not in NOT_WRITTEN}
_SOURCE_TYPES = frozenset({"F32", "F16", "BF16"})


def quantize(source: Path, out: Path, type_name: str, imatrix: Path | None = None) -> None:
    """Write the model at `source` to `out` as `type_name`, one of TYPES; `out` appears whole or not at all.

    Raises LayerscopeError for an unknown type, a source that is quantized already, a type that needs an importance matrix when none
    is given, an `out` that exists, and when llama.cpp refuses.
    """
    source, out = Path(source), Path(out)
    wanted = check_type(type_name, imatrix is not None)
    if out.exists():
        raise LayerscopeError(f"{out} exists already; name another output, or delete it first.")
    importance = read_imatrix(imatrix) if imatrix is not None else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".quantize-") as folder:
        try:
            run_quantizer(_as_gguf(source, Path(folder)), part, TYPES[wanted], importance)
            if out.exists():
                raise LayerscopeError(f"{out} was made by somebody else in the meantime; name another output.")
            publish(part, out)
        finally:
            part.unlink(missing_ok=True)


def check_type(type_name: str, has_imatrix: bool) -> str:
    """The type's proper name. Raises LayerscopeError for one that does not exist, or that needs an importance matrix."""
    name = type_name.upper()
    if name in NOT_WRITTEN:
        raise LayerscopeError(f"llama.cpp's quantizer cannot write {name}; it writes {', '.join(TYPES)}.")
    if name not in TYPES:
        raise LayerscopeError(f"There is no quantization {type_name[:40]!r}; there are {', '.join(TYPES)}.")
    if name in NEED_IMATRIX and not has_imatrix:
        raise LayerscopeError(f"{name} needs an importance matrix (--imatrix), which llama.cpp's llama-imatrix makes; without one Q2_K and larger types work.")
    return name


def default_output(source: Path, type_name: str) -> Path:
    """Beside the source: its name, without the type that it may end in, and the new type.

    >>> default_output(Path("models/tiny-f16.gguf"), "Q4_K_M")
    PosixPath('models/tiny-q4_k_m.gguf')
    """
    stem = source.stem if source.suffix.lower() == ".gguf" else source.name
    head, dash, last = stem.rpartition("-")
    return source.with_name(f"{head if dash and last.upper() in _SOURCE_TYPES else stem}-{type_name.lower()}.gguf")


def _as_gguf(source: Path, folder: Path) -> Path:
    """The source as an unquantized GGUF file; a folder of safetensors is written to one first, every weight as it is."""
    if source.is_dir():
        from backend.files.gguf_writer import write_gguf

        write_gguf(source, folder / "source.gguf", ftype="f32")
        return folder / "source.gguf"
    kinds = {tensor.type_name for tensor in read_header(source).tensors.values()} - _SOURCE_TYPES
    if kinds:
        raise LayerscopeError(f"{source.name} is quantized already ({', '.join(sorted(kinds))}); start from an F32, F16 or BF16 file, so that errors do not add up.")
    return source


def run_quantizer(source: Path, out: Path, ftype: int, importance: Mapping[str, NDArray[np.float32]] = {}) -> None:
    """llama.cpp's quantizer as it is. ftype: its number for the type. Raises LayerscopeError with its reason when it refuses."""
    llama = open_llama()
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.nthread = ftype, default_threads()
    entries = (llama.llama_model_imatrix_data * (len(importance) + 1))()  # ends with an entry without a name
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        entry.name, entry.data, entry.size = name.encode(), values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), len(values)
    if importance:
        params.imatrix = entries
    forget_errors()
    if llama.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(params)) != 0:
        raise LayerscopeError(f"llama.cpp could not quantize {source.name} to {FILE_TYPES.get(ftype, ftype)}: {first_error()}.")
