"""Kernels that are imported when they are first used: with Numba, up to a second and 70 MB."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import cast

__all__ = ["load_kernel"]


@cache
def load_kernel(module: str, name: str) -> Callable[..., None]:
    """Return a function of a file in kernels/."""
    return cast(Callable[..., None], getattr(import_module(f"edgemerge.kernels.{module}"), name))
