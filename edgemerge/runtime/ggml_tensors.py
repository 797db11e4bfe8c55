"""ggml's tensors, read where they lie while llama.cpp computes a graph.

llama-cpp-python tells nothing of them, so the fields of `struct ggml_tensor` (ggml.h) are declared here.
Before they are trusted, tensors are made whose fields are known. A library that keeps them elsewhere is
refused.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from edgemerge.errors import RuntimeFailure
from edgemerge.runtime.library import Library
from edgemerge.types import Float32, UInt8

__all__ = ["F32", "Ggml", "Tensor"]

F32, I32 = 0, 26  # enum ggml_type of ggml.h
ROOM = 1 << 16  # bytes of the tensors that are made to check the layout


class Tensor(ctypes.Structure):
    """Struct ggml_tensor of ggml.h; sizes `ne` and strides `nb` (bytes) have the innermost axis first."""


Tensor._fields_ = (
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
)


class _InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


class Ggml:
    """ggml, as llama.cpp brings it into this process.

    Parameters
    ----------
    library : Library
        The loaded llama.cpp.

    Attributes
    ----------
    matmul, expert_matmul : int
        `Tensor.op` of GGML_OP_MUL_MAT and GGML_OP_MUL_MAT_ID, whose numbers change with versions.

    Raises
    ------
    RuntimeFailure
        Its tensors are not laid out as declared here.
    """

    def __init__(self, library: Library) -> None:
        try:
            # A handle of our own, so that declarations of arguments do not meet those of others.
            self._lib = ctypes.CDLL(library.api.llama_cpp._lib._name)
            self._declare()
        except AttributeError:
            raise _unknown_layout() from None
        self.matmul, self.expert_matmul = self._check_layout()

    def _declare(self) -> None:
        pointer, size = ctypes.POINTER(Tensor), ctypes.c_size_t
        signatures: dict[str, tuple[Any, tuple[Any, ...]]] = {
            "ggml_init": (ctypes.c_void_p, (_InitParams,)),
            "ggml_free": (None, (ctypes.c_void_p,)),
            "ggml_new_tensor": (
                pointer,
                (ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_int64)),
            ),
            "ggml_set_name": (pointer, (pointer, ctypes.c_char_p)),
            "ggml_get_data": (ctypes.c_void_p, (pointer,)),
            "ggml_mul_mat": (pointer, (ctypes.c_void_p, pointer, pointer)),
            "ggml_mul_mat_id": (pointer, (ctypes.c_void_p, pointer, pointer, pointer)),
            "ggml_op_name": (ctypes.c_char_p, (ctypes.c_int,)),
            "ggml_nbytes": (size, (pointer,)),
            "ggml_backend_buffer_is_host": (ctypes.c_bool, (ctypes.c_void_p,)),
            "ggml_backend_tensor_get": (None, (pointer, ctypes.c_void_p, size, size)),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(self._lib, name)
            function.restype, function.argtypes = result, arguments

    def _check_layout(self) -> tuple[int, int]:
        """Make products of known shapes, and find their fields as declared; return the two operations."""
        lib = self._lib
        context = lib.ggml_init(_InitParams(ROOM, None, False))
        if not context:
            raise RuntimeFailure(
                "llama.cpp cannot make a tensor, for want of memory; close programs"
            )

        def new(kind: int, *sizes: int) -> Any:
            return lib.ggml_new_tensor(
                context, kind, len(sizes), (ctypes.c_int64 * len(sizes))(*sizes)
            )

        try:
            weights, x, ids = new(F32, 8, 3, 2), new(F32, 8, 1, 5), new(I32, 1, 5)
            lib.ggml_set_name(weights, b"a name")
            whole, by_expert = (
                lib.ggml_mul_mat(context, weights, new(F32, 8, 5, 2)).contents,
                lib.ggml_mul_mat_id(context, weights, x, ids).contents,
            )
            sources = (weights, x, ids)
            is_known = (
                (weights.contents.type, ids.contents.type) == (F32, I32)
                and weights.contents.name == b"a name"
                and (tuple(whole.ne), tuple(whole.nb)) == ((3, 5, 2, 1), (4, 12, 60, 120))
                and weights.contents.data == lib.ggml_get_data(weights)
                and all(
                    ctypes.addressof(by_expert.src[i].contents) == ctypes.addressof(one.contents)
                    for i, one in enumerate(sources)
                )
            )
            # A number that is no operation must not reach ggml, so it is looked at last.
            is_known = is_known and lib.ggml_op_name(whole.op) == b"MUL_MAT"
            if not is_known or lib.ggml_op_name(by_expert.op) != b"MUL_MAT_ID":
                raise _unknown_layout()
            return whole.op, by_expert.op
        except ValueError:  # a null pointer where a source is declared
            raise _unknown_layout() from None
        finally:
            lib.ggml_free(context)

    def read(self, tensor: Tensor) -> UInt8:
        """Return a tensor's bytes, from its data to the end of its last row; a copy if on a device."""
        n_bytes = self._lib.ggml_nbytes(ctypes.byref(tensor))
        if self._lib.ggml_backend_buffer_is_host(tensor.buffer):
            return np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(tensor.data))
        copy = np.empty(n_bytes, np.uint8)
        self._lib.ggml_backend_tensor_get(ctypes.byref(tensor), copy.ctypes.data, 0, n_bytes)
        return copy

    def read_rows(self, tensor: Tensor) -> Float32:
        """Return a float32 tensor as (ne[3], ne[2], ne[1], ne[0]), which need not be contiguous."""
        shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
        return np.ndarray(shape, np.float32, self.read(tensor), strides=strides)

    def read_ids(self, tensor: Tensor) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Return a matrix of int32 as (ne[1], ne[0])."""
        shape, strides = (tensor.ne[1], tensor.ne[0]), (tensor.nb[1], tensor.nb[0])
        return np.ndarray(shape, np.int32, self.read(tensor), strides=strides)


def _unknown_layout() -> RuntimeFailure:
    return RuntimeFailure(
        "this llama-cpp-python keeps its tensors in another form than edgemerge knows: install 0.3.36 "
        "with pip install 'llama-cpp-python==0.3.36'"
    )
