"""ggml's own quantisers, called through ctypes: the bytes that every codec must give.

They come from the libggml-base that llama-cpp-python ships, found without importing llama_cpp,
which would load the whole of llama.cpp.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_NAMES = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}
_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class TypeTraits(ctypes.Structure):
    """Struct ggml_type_traits of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block_len", ctypes.c_int64),
        ("block_len_interleave", ctypes.c_int64),
        ("block_bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    )


@cache
def library() -> ctypes.CDLL:
    """The shared library, with the signatures that are used here; EDGEMERGE_GGML names another build."""
    lib = ctypes.CDLL(os.environ.get("EDGEMERGE_GGML") or str(_installed()))
    lib.ggml_get_type_traits.restype = ctypes.POINTER(TypeTraits)
    lib.ggml_get_type_traits.argtypes = [ctypes.c_int]
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),  # type, source, destination
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),  # start, rows, elements of a row
        ctypes.c_void_p,  # importance matrix
    ]
    return lib


def _installed() -> Path:
    spec = find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("llama_cpp")
    folder = Path(spec.submodule_search_locations[0]) / "lib"
    return folder / _NAMES.get(sys.platform, "libggml-base.so")


def traits(kind: int) -> TypeTraits:
    """What ggml knows of a type."""
    return library().ggml_get_type_traits(kind).contents


def dequantize(
    kind: int, raw_u8: NDArray[np.uint8], out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """ggml's values of whole blocks, in an array that may be given."""
    known = traits(kind)
    if out is None:
        out = np.empty(raw_u8.size // known.block_bytes * known.block_len, np.float32)
    if known.to_float is None:  # F32
        out[:] = raw_u8.view(np.float32)
        return out
    _TO_FLOAT(known.to_float)(raw_u8.ctypes.data, out.ctypes.data, out.size)
    return out


def quantize(
    kind: int,
    x_f32: NDArray[np.float32],
    importance_f32: NDArray[np.float32] | None = None,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """ggml's blocks of rows, as llama-quantize writes them, with the importances of columns or without."""
    n_rows, n_cols = x_f32.shape
    known = traits(kind)
    if out is None:
        out = np.empty(n_rows * n_cols // known.block_len * known.block_bytes, np.uint8)
    weights = None if importance_f32 is None else importance_f32.ctypes.data
    args = (kind, x_f32.ctypes.data, out.ctypes.data, 0, n_rows, n_cols, weights)
    assert library().ggml_quantize_chunk(*args) == out.size
    return out


@cache
def fuses() -> bool:
    """Whether this build contracts a * b + c into one rounding, so that its quantisers differ.

    Compilers do so in native builds; `-ffp-contract=off` forbids it. In this Q4_0 block
    x / d + 8.5 rounds to 11 when the product is rounded first, and to just below 11 when it is not.
    """
    x = np.full((1, 32), 0.2916346788406372, np.float32)
    x[0, 0] = -0.9332311749458313
    return bool(quantize(2, x)[-1] != 0xBB)
