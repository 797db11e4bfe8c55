"""Calling a kernel's machine code: arguments checked, the GIL released, no Numba in the process.

A function that Numba compiles takes its arguments unpacked (`numba.core.callconv.CPUCallConv`): two
pointers for result and exception, then each scalar, and of each array two owners, which ours have not, the
number of items, their size, the address, the shape and the strides in bytes.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, cast

import numpy as np

from edgemerge.native.image import PlacedImage
from edgemerge.native.signatures import SIGNATURES
from edgemerge.native.store import load_image

__all__ = ["Kernel", "KernelFile", "load_kernel"]

_SCALARS: dict[str, tuple[type[Any], Callable[[Any], Any]]] = {
    "i8": (ctypes.c_int64, int),
    "u8": (ctypes.c_uint64, int),
    "f4": (ctypes.c_float, float),
    "f8": (ctypes.c_double, float),
    "b1": (ctypes.c_uint8, int),
}
# Kernels return nothing, and say no more than that they failed: all calls may share these.
_RESULT, _ERROR = ctypes.create_string_buffer(8), ctypes.create_string_buffer(8)
_OUTPUTS = ctypes.addressof(_RESULT), ctypes.addressof(_ERROR)
_LOCK = threading.Lock()


class KernelFile:
    """A file in kernels/: its attributes are its kernels, compiled or loaded when they are first called.

    With NUMBA_DISABLE_JIT they are the plain Python functions.
    """

    def __init__(self, file: str) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Callable[..., None]:
        kernel: Callable[..., None]
        if os.environ.get("NUMBA_DISABLE_JIT", "0") != "0":
            kernel = getattr(import_module(f"edgemerge.kernels.{self._file}"), name)
        elif name not in SIGNATURES[self._file]:
            raise AttributeError(f"kernels/{self._file}.py has no {name}")
        else:
            kernel = Kernel(self._file, name)
        setattr(self, name, kernel)
        return kernel


@cache
def load_kernel(file: str, name: str) -> Callable[..., None]:
    """Return a kernel by name; `KernelFile` says what it is."""
    return cast(Callable[..., None], getattr(KernelFile(file), name))


class Kernel:
    """One compiled kernel.

    Parameters
    ----------
    file, name : str
        As in `SIGNATURES`.
    """

    def __init__(self, file: str, name: str) -> None:
        self._file, self._name = file, name
        self._packers = [_packer(kind) for kind in SIGNATURES[file][name].split(", ")]
        self._placed: PlacedImage | None = None
        self._function: Callable[..., int] | None = None

    def __call__(self, *arguments: Any) -> None:
        """Run the kernel; other threads run meanwhile."""
        function = self._function or self._load()
        flat: list[Any] = [*_OUTPUTS]
        for pack, argument in zip(self._packers, arguments, strict=True):
            pack(argument, flat)
        if function(*flat):
            raise ArithmeticError(f"kernel {self._file}.{self._name} failed")

    def _load(self) -> Callable[..., int]:
        with _LOCK:
            if self._function is None:
                self._placed = PlacedImage(load_image(self._file, self._name))
                kinds = [ctypes.c_void_p, ctypes.c_void_p]
                for kind in SIGNATURES[self._file][self._name].split(", "):
                    kinds += _ctypes_of(kind)
                self._function = ctypes.CFUNCTYPE(ctypes.c_int32, *kinds)(self._placed.address)
            return self._function


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
