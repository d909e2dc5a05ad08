"""ggml through ctypes: what llama-cpp-python does not bind. The tensor struct, its bytes, and ggml's own dequantization.

    Tensor                      struct ggml_tensor of the ggml inside llama-cpp-python 0.3.36
    view(t)                     a tensor's values where they lie, or a copy where that is not this machine's memory
    read(t), write(t, values)   a tensor's values through ggml_backend_tensor_get/set: right on every backend, CPU or GPU
    read_bytes, write_bytes     a tensor's bytes as they are stored, blocks of quantized types too
    dequantize(type, bytes, n)  ggml's to_float: the numbers that its kernels see
    quantize(type, values)      ggml's own rounding to that type
    open_llama()                llama_cpp, its back end initialised and its log lines kept instead of printed

Only libggml-base.so is loaded until open_llama() is called, so weights can be dequantized where llama.cpp never comes in.
The struct is private to ggml: `check_layout` holds it against a live node, and an engine does so before it trusts one.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.engines.threads import prepare
from backend.errors import LayerscopeError

F32, F16, I32 = 0, 1, 26
_NUMPY_TYPES: dict[int, np.dtype[Any]] = {F32: np.dtype(np.float32), F16: np.dtype(np.float16), I32: np.dtype(np.int32)}
_LOG_ERROR = 4  # enum ggml_log_level


class Tensor(ctypes.Structure):
    """struct ggml_tensor. `ne` counts values along each axis and `nb` is the axis' stride in bytes, fastest axis first."""


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.POINTER(Tensor)),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]

_GGML_OBJECT_BYTES = 32  # sizeof(struct ggml_object), which ggml_tensor_overhead counts in

NAME_OFFSET: int = Tensor.name.offset
OP_OFFSET: int = Tensor.op.offset


class _TypeTraits(ctypes.Structure):
    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    )


_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


@functools.cache
def _base() -> ctypes.CDLL:
    """libggml-base of the installed wheel, found without importing llama_cpp."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise LayerscopeError("llama-cpp-python is not installed, and GGUF models need it.")
    folder = Path(spec.origin).parent / "lib"
    found = [path for pattern in ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll") for path in folder.glob(pattern)]
    if not found:
        raise LayerscopeError(f"llama-cpp-python at {folder} has no ggml-base library; install version 0.3.36.")
    lib = ctypes.CDLL(str(found[0]))
    for function in (lib.ggml_backend_tensor_get, lib.ggml_backend_tensor_set):
        function.argtypes, function.restype = [ctypes.POINTER(Tensor), ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t], None
    lib.ggml_backend_buffer_is_host.argtypes, lib.ggml_backend_buffer_is_host.restype = [ctypes.c_void_p], ctypes.c_bool
    lib.ggml_tensor_overhead.argtypes, lib.ggml_tensor_overhead.restype = [], ctypes.c_size_t
    n_bytes = lib.ggml_tensor_overhead() - _GGML_OBJECT_BYTES
    if n_bytes != ctypes.sizeof(Tensor):
        raise LayerscopeError(f"The installed llama-cpp-python has tensors of {n_bytes} bytes, not the {ctypes.sizeof(Tensor)} of version 0.3.36.")
    lib.ggml_op_name.argtypes, lib.ggml_op_name.restype = [ctypes.c_int], ctypes.c_char_p
    lib.ggml_op_desc.argtypes, lib.ggml_op_desc.restype = [ctypes.POINTER(Tensor)], ctypes.c_char_p
    lib.ggml_backend_buffer_name.argtypes, lib.ggml_backend_buffer_name.restype = [ctypes.c_void_p], ctypes.c_char_p
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_requires_imatrix.argtypes, lib.ggml_quantize_requires_imatrix.restype = [ctypes.c_int], ctypes.c_bool
    lib.ggml_get_type_traits.argtypes, lib.ggml_get_type_traits.restype = [ctypes.c_int], ctypes.POINTER(_TypeTraits)
    return lib


def op_name(op: int) -> str:
    """MUL_MAT, ROPE, SOFT_MAX, ... for an `op` read from a tensor."""
    return _base().ggml_op_name(op).decode()


def op_description(tensor: Tensor) -> str:
    """The op, or the function of a UNARY or GLU node: SILU, SWIGLU, ..."""
    return _base().ggml_op_desc(ctypes.byref(tensor)).decode()


def buffer_name(tensor: Tensor) -> str:
    """Where a tensor's values lie: CPU, CPU_Mapped, CUDA0, ...; a view's lie with what it views. Empty before they lie anywhere."""
    owner = tensor.view_src.contents if tensor.view_src and not tensor.buffer else tensor
    return _base().ggml_backend_buffer_name(owner.buffer).decode("utf-8", "replace") if owner.buffer else ""


def type_traits(type_id: int) -> tuple[str, int, int]:
    """(name, values in a block, bytes of a block) as ggml states them; `type_id` is one of backend.files.ggml_types.GGML_TYPES."""
    traits = _base().ggml_get_type_traits(type_id).contents
    return traits.type_name.decode(), traits.blck_size, traits.type_size


def row_size(type_id: int, n: int) -> int:
    """Bytes of a row of `n` values; raises LayerscopeError when `n` does not fill whole blocks."""
    name, block, n_bytes = type_traits(type_id)
    if n % block:
        raise LayerscopeError(f"A row of {n:,} values does not fill whole blocks of {block} {name} values.")
    return n // block * n_bytes


def can_dequantize(type_id: int) -> bool:
    """Whether ggml has values of this type as floats: integers and the types of intermediate results it has not."""
    return type_id == F32 or bool(_base().ggml_get_type_traits(type_id).contents.to_float)


def dequantize(type_id: int, data: Any, n: int, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """The `n` values stored in `data` (any contiguous buffer of exactly that many blocks), as float32 of shape (n,).

    out: contiguous float32 (n,) to write them to, so that a loop over blocks needs no new memory. Other threads run meanwhile.
    """
    raw = np.frombuffer(data, np.uint8)
    if raw.nbytes != (expected := row_size(type_id, n)):
        raise LayerscopeError(f"{n:,} values of type {type_traits(type_id)[0]} take {expected:,} bytes, not {raw.nbytes:,}.")
    out = np.empty(n, np.float32) if out is None else out
    assert out.shape == (n,) and out.dtype == np.float32 and out.flags.c_contiguous, "out holds exactly the values"
    if type_id == F32:  # ggml has no conversion of float32 to itself
        out[:] = raw.view(np.float32)
        return out
    to_float = _base().ggml_get_type_traits(type_id).contents.to_float
    if not to_float:
        raise LayerscopeError(f"ggml cannot convert the type {type_traits(type_id)[0]} to float32.")
    _TO_FLOAT(to_float)(raw.ctypes.data, out.ctypes.data, n)
    return out


def quantize(type_id: int, values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Finite values (block, values in a block) as ggml stores them: (block, bytes of a block). Inverse of `dequantize`, up to rounding.

    Types that ggml quantizes with an importance matrix only are given equal importances. The codebook types make their tables
    at the first call, which takes up to ten seconds for IQ1_S and IQ1_M.
    """
    n, block = values.shape
    assert block == type_traits(type_id)[1] and np.isfinite(values).all(), "whole blocks of finite values: ggml asserts it too, and ends the process"
    lib, source = _base(), np.ascontiguousarray(values, np.float32)
    out = np.zeros((n, row_size(type_id, block)), np.uint8)
    importance = np.ones(block, np.float32) if lib.ggml_quantize_requires_imatrix(type_id) else None
    lib.ggml_quantize_chunk(type_id, source.ctypes.data, out.ctypes.data, 0, n, block, None if importance is None else importance.ctypes.data)
    return out


def read_bytes(tensor: Tensor, offset: int, n: int) -> NDArray[np.uint8]:
    """`n` bytes of a tensor as they are stored, from `offset` on, copied."""
    raw = np.empty(n, np.uint8)
    _base().ggml_backend_tensor_get(ctypes.byref(tensor), raw.ctypes.data, offset, n)
    return raw


def write_bytes(tensor: Tensor, offset: int, raw: NDArray[np.uint8]) -> None:
    """Put bytes into a tensor; the process ends where its memory is a mapped file."""
    _base().ggml_backend_tensor_set(ctypes.byref(tensor), raw.ctypes.data, offset, raw.nbytes)


def view(tensor: Tensor) -> tuple[NDArray[Any], bool]:
    """A tensor's values as `read` gives them, and whether they are a private copy.

    On a CPU they are not: the array is ggml's own memory, read-only, and good until the callback that was given the tensor returns.
    """
    if not tensor.buffer or not _base().ggml_backend_buffer_is_host(tensor.buffer):
        return read(tensor), True
    dtype, shape, strides, span = _layout(tensor)
    raw = np.frombuffer(memoryview((ctypes.c_uint8 * span).from_address(tensor.data)), np.uint8)
    values: NDArray[Any] = np.ndarray(shape, dtype, buffer=raw, strides=strides)
    values.flags.writeable = False
    return values, False


def _layout(tensor: Tensor) -> tuple[np.dtype[Any], tuple[int, ...], tuple[int, ...], int]:
    """dtype, shape and strides in NumPy's axis order, and the bytes from the first to the last value."""
    dtype = _NUMPY_TYPES.get(tensor.type)
    if dtype is None:
        raise LayerscopeError(f"Node {tensor.name.decode()} holds {type_traits(tensor.type)[0]} values, which are not activations.")
    shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    return dtype, shape, strides, sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + dtype.itemsize


def read(tensor: Tensor) -> NDArray[Any]:
    """A tensor's values as a strided NumPy array in NumPy's axis order (4 axes), over a private copy of its bytes.

    The copy spans the tensor's strides, so that `write` can put a view back without touching what lies between.
    """
    dtype, shape, strides, span = _layout(tensor)
    raw = np.empty(span, np.uint8)
    _base().ggml_backend_tensor_get(ctypes.byref(tensor), raw.ctypes.data, 0, span)
    return np.ndarray(shape, dtype, buffer=raw, strides=strides)


def write(tensor: Tensor, values: NDArray[Any]) -> None:
    """Put back an array that `read` gave, changed in place."""
    raw = values.base
    assert isinstance(raw, np.ndarray), "write takes the array that read returned"
    _base().ggml_backend_tensor_set(ctypes.byref(tensor), raw.ctypes.data, 0, raw.nbytes)


def scale_of_soft_max(tensor: Tensor) -> float:
    """The factor that ggml_soft_max_ext multiplies its input with before it adds the mask: the first float of op_params."""
    return float(np.frombuffer(tensor.op_params, np.float32, 1)[0])


def check_layout(tensor: Tensor, name: str, width: int, n: int) -> None:
    """Raise LayerscopeError unless a node that must be float32 (n, width) called `name` reads as just that."""
    seen = (tensor.name.decode("utf-8", "replace"), tensor.type, tuple(tensor.ne), tuple(tensor.nb))
    if seen != (name, F32, (width, n, 1, 1), (4, 4 * width, 4 * width * n, 4 * width * n)):
        raise LayerscopeError(f"The installed llama-cpp-python has another tensor layout than 0.3.36: node {name!r} reads as {seen}.")


class _Log:
    """Keeps what llama.cpp complains about; it prints nothing of its own any more."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def __call__(self, level: int, text: bytes, _user_data: Any) -> None:
        if level == _LOG_ERROR and len(self.errors) < 20:
            self.errors.append(text.decode("utf-8", "replace").strip())


_LOG = _Log()
_KEPT: list[Any] = []


@functools.cache
def open_llama() -> ModuleType:
    """The llama_cpp bindings, initialised once per process, with the log callback kept for as long as the process lives."""
    prepare()
    from llama_cpp import llama_cpp

    callback = llama_cpp.llama_log_callback(_LOG)
    _KEPT.append(callback)  # a collected callback is a crash at llama.cpp's next log line
    llama_cpp.llama_log_set(callback, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    return llama_cpp


def forget_errors() -> None:
    _LOG.errors.clear()


def first_error() -> str:
    """The first error that llama.cpp logged since `forget_errors`: the cause; those after it are its consequences."""
    return _LOG.errors[0] if _LOG.errors else "it gave no reason"
