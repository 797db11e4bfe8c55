"""Stored tensors that GGUF has otherwise: cut in several, in another order, or changed in value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from edgemerge.types import Float32

__all__ = ["Change", "Cut", "Layout", "Stored", "negative_exp", "no_layout", "whole"]

Change = Callable[[Float32], Float32]


@dataclass(frozen=True, slots=True)
class Cut:
    """One GGUF tensor, made of pieces of a stored one; rows of a vector have one element."""

    stem: str  # its GGUF name without `blk.N.`
    shape: tuple[int, ...]
    starts: tuple[int, ...]  # first stored row of each piece, in GGUF's order
    height: int  # rows of a piece
    columns: tuple[int, ...] = ()  # stored group of columns -> its place in GGUF; () as they are
    change: Change | None = None  # None: the bytes are passed on; else float32 is made of them


@dataclass(frozen=True, slots=True)
class Stored:
    """A stored tensor: the shape that config.json makes it, and what GGUF makes of it."""

    shape: tuple[int, ...]
    cuts: tuple[Cut, ...]


# Of a layer, or of None for what belongs to none: Hugging Face name without `model.layers.N.` -> tensor
Layout = Callable[[int | None], Mapping[str, Stored]]


def no_layout(layer: int | None) -> Mapping[str, Stored]:
    """Return nothing, for a family whose tensors are as the common rules have them."""
    return {}


def whole(stem: str, shape: tuple[int, ...], columns: Iterable[int] = ()) -> Stored:
    """Return a tensor that GGUF has in one piece, with its groups of columns moved where some are given."""
    height = shape[0] if len(shape) == 1 else prod(shape[:-1])
    return Stored(shape, (Cut(stem, shape, (0,), height, tuple(columns)),))


def negative_exp(log: Float32) -> Float32:
    """Return -exp(log): the decay of a state, of which the logarithm is stored.

    As `Qwen3NextModel.modify_tensors` of llama.cpp's conversion/qwen.py; but rounded once, from float64, so
    that no vector library decides on the last bit.
    """
    return np.asarray(-np.exp(log.astype(np.float64)), np.float32)
