"""Calls machine code that Numba made: arguments checked and unpacked, the GIL released.

A function that Numba compiles takes its arguments unpacked (`numba.core.callconv.CPUCallConv`). First come
two pointers, for result and exception, then the arguments. A scalar is one value. An array is two owners
(null here), the number of items, their size, the address, the shape and the strides in bytes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from edgemerge.native.image import Image, PlacedImage

__all__ = ["Function"]

_SCALARS: dict[str, tuple[type[Any], Callable[[Any], Any]]] = {
    "i8": (ctypes.c_int64, int),
    "u8": (ctypes.c_uint64, int),
    "f4": (ctypes.c_float, float),
    "f8": (ctypes.c_double, float),
    "b1": (ctypes.c_uint8, int),
}
# Kernels return nothing, and say no more than that they failed: all calls may use the same ones.
_RESULT, _ERROR = ctypes.create_string_buffer(8), ctypes.create_string_buffer(8)
_OUTPUTS = ctypes.addressof(_RESULT), ctypes.addressof(_ERROR)


class Function:
    """An image that can be called.

    Parameters
    ----------
    image : Image
        Its machine code.
    signature : str
        Types of the arguments, as in `SIGNATURES`.

    Raises
    ------
    OSError
        The system allows no memory to become executable.
    """

    def __init__(self, image: Image, signature: str) -> None:
        kinds = signature.split(", ")
        self._packers = [_packer(kind) for kind in kinds]
        self._placed = PlacedImage(image)
        types = [ctypes.c_void_p, ctypes.c_void_p, *(t for kind in kinds for t in _ctypes_of(kind))]
        self._call = ctypes.CFUNCTYPE(ctypes.c_int32, *types)(self._placed.address)

    def __call__(self, *arguments: Any) -> None:
        """Run it; other threads run meanwhile.

        Raises
        ------
        ArithmeticError
            It failed.
        TypeError
            An argument is of another type or layout.
        """
        flat: list[Any] = [*_OUTPUTS]
        for pack, argument in zip(self._packers, arguments, strict=True):
            pack(argument, flat)
        if self._call(*flat):
            raise ArithmeticError("machine code failed")


def _ctypes_of(kind: str) -> list[Any]:
    if "[" not in kind:
        return [_SCALARS[kind][0]]
    n_dims = kind.count(":,") + 1
    pointers, sizes = ctypes.c_void_p, ctypes.c_ssize_t
    return [pointers, pointers, sizes, sizes, pointers, *[sizes] * (2 * n_dims)]


def _packer(kind: str) -> Callable[[Any, list[Any]], None]:
    """Return what checks one argument, and appends it to the flat list."""
    code, bracket, _ = kind.partition("[")
    if not bracket:
        convert = _SCALARS[kind][1]
        return lambda argument, flat: flat.append(convert(argument))
    dtype, n_dims = np.dtype(code), kind.count(":,") + 1
    item_size = dtype.itemsize
    byte_at, address_of = ctypes.c_char.from_buffer, ctypes.addressof

    def pack(array: Any, flat: list[Any]) -> None:
        # Machine code checks nothing: another type or layout would be read as something else.
        if array.dtype != dtype or array.ndim != n_dims or not array.flags.carray:
            raise TypeError(f"{array.dtype}, {array.ndim}-D: a kernel takes contiguous {kind}")
        size = array.size
        # A quarter of what array.ctypes.data takes, but there is no first byte of nothing.
        address = address_of(byte_at(array)) if size else array.ctypes.data
        if n_dims == 1:
            flat += (None, None, size, item_size, address, size, item_size)
        else:
            flat += (None, None, size, item_size, address, *array.shape, *array.strides)

    return pack
