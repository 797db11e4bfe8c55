"""Kernels by name: their machine code is loaded when they are first called, without Numba in the process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, cast

from edgemerge.native.function import Function
from edgemerge.native.signatures import SIGNATURES
from edgemerge.native.store import load_image

__all__ = ["Kernel", "KernelFile", "load_kernel"]

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
        self._function: Function | None = None

    def __call__(self, *arguments: Any) -> None:
        """Run the kernel; other threads run meanwhile."""
        function = self._function or self._load()
        try:
            function(*arguments)
        except ArithmeticError:
            raise ArithmeticError(f"kernel {self._file}.{self._name} failed") from None

    def _load(self) -> Function:
        with _LOCK:
            if self._function is None:
                image = load_image(self._file, self._name)
                self._function = Function(image, SIGNATURES[self._file][self._name])
            return self._function
