"""Stored tensors that a family cuts by rules of its own: in several, or in another order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod

__all__ = ["Cut", "Cuts", "Stored", "no_cuts", "whole"]


@dataclass(frozen=True, slots=True)
class Cut:
    """One GGUF tensor, made of pieces of a stored one; rows of a vector have one element."""

    stem: str  # its GGUF name without `blk.N.`
    shape: tuple[int, ...]
    starts: tuple[int, ...]  # first stored row of each piece, in GGUF's order
    height: int  # rows of a piece
    columns: tuple[int, ...] = ()  # stored group of columns -> its place in GGUF; () as they are


@dataclass(frozen=True, slots=True)
class Stored:
    """A stored tensor: the shape that config.json makes it, and what GGUF makes of it."""

    shape: tuple[int, ...]
    cuts: tuple[Cut, ...]


# Of a layer, or of None for what belongs to none: Hugging Face name without `model.layers.N.` -> tensor
Cuts = Callable[[int | None], Mapping[str, Stored]]


def no_cuts(layer: int | None) -> Mapping[str, Stored]:
    """Return nothing, for a family whose tensors are as the common rules have them."""
    return {}


def whole(stem: str, shape: tuple[int, ...], columns: Iterable[int] = ()) -> Stored:
    """Return a tensor that GGUF has in one piece, with its groups of columns moved where some are given."""
    height = shape[0] if len(shape) == 1 else prod(shape[:-1])
    return Stored(shape, (Cut(stem, shape, (0,), height, tuple(columns)),))
