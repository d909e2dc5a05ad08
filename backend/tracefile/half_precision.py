"""float32 to float16 and back, as fast as the processor can: the conversion that every stored activation goes through.

NumPy converts one value at a time (2.6 ms a million on the machine where this was measured, 3.6 back); ggml's CPU library, which is
installed with llama-cpp-python, uses the processor's own instructions (0.08 ms). Both round to the nearest, ties to even, and
make what is too large infinite. Where that library is missing NumPy does it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FLOAT16_MAX = 65_504.0
_INFINITE = 0x7C00  # the exponent of infinities and NaN


def to_float16(values: NDArray[np.float32], out: NDArray[np.float16] | None = None) -> NDArray[np.float16]:
    """`values` in half precision, in a new array or in `out` (contiguous, of the same shape)."""
    source = np.ascontiguousarray(values, np.float32)
    if out is None:
        out = np.empty(values.shape, np.float16)
    convert = _ggml_convert()
    if convert is not None and out.flags.c_contiguous and out.shape == source.shape:
        convert(source.ctypes.data, out.ctypes.data, source.size)
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            out[...] = source
    return out


def from_float16(half: NDArray[np.float16]) -> NDArray[np.float32]:
    """`half` in single precision, in a new array: exact."""
    source = np.ascontiguousarray(half)
    convert = _ggml_widen()
    if convert is None:
        return source.astype(np.float32)
    out = np.empty(source.shape, np.float32)
    convert(source.ctypes.data, out.ctypes.data, source.size)
    return out


def overflowed(half: NDArray[np.float16], values: NDArray[np.float32]) -> bool:
    """Whether a finite value became infinite in `half`."""
    # As whole numbers: no positive one reaches +inf, and no negative one, whose first bit is set, -inf.
    if not half.size or (int(half.view(np.int16).max()) < _INFINITE and int(half.view(np.uint16).max()) < 0x8000 | _INFINITE):
        return False
    return bool((np.isinf(half) & np.isfinite(values)).any())


@functools.cache
def _ggml_convert() -> Callable[[int, int, int], Any] | None:
    """ggml_cpu_fp32_to_fp16(const float *, ggml_fp16_t *, int64_t)"""
    return _ggml("ggml_cpu_fp32_to_fp16")


@functools.cache
def _ggml_widen() -> Callable[[int, int, int], Any] | None:
    """ggml_cpu_fp16_to_fp32(const ggml_fp16_t *, float *, int64_t)"""
    return _ggml("ggml_cpu_fp16_to_fp32")


def _ggml(function: str) -> Callable[[int, int, int], Any] | None:
    """A conversion of the installed wheel's CPU library; importing llama_cpp is not needed."""
    spec = importlib.util.find_spec("llama_cpp")
    folder = Path(spec.origin).parent / "lib" if spec and spec.origin else Path()
    for name in ("libggml-cpu.so", "libggml-cpu.dylib"):
        try:
            library = ctypes.CDLL(str(folder / name))
            library.ggml_cpu_init()  # fills the table that some values go through; does nothing the second time
            convert = getattr(library, function)
        except (OSError, AttributeError):
            continue  # another platform, or a build with the processor's back ends as plug-ins: NumPy does it
        convert.argtypes, convert.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
        return convert
    return None
