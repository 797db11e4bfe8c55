"""Stored tensors that a family cuts by rules of its own: in several, or in another order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod

__all__ = ["Cut", "Cuts", "Stored", "no_cuts", "stacked", "whole"]


@dataclass(frozen=True, slots=True)
class Cut:
    """One GGUF tensor, made of pieces of a stored one; rows of a vector have one element.

    Where the pieces are fewer rows than it has, the others are 0.
    """

    stem: str  # its GGUF name without `blk.N.`
    shape: tuple[int, ...]
    starts: tuple[int, ...]  # first stored row of each piece, in GGUF's order
    height: int  # rows of a piece
    columns: tuple[int, ...] = ()  # stored group of columns -> its place in GGUF; () as they are


@dataclass(frozen=True, slots=True)
class Stored:
    """A stored tensor: the shape that config.json makes it, and what GGUF makes of it, if anything."""

    shape: tuple[int, ...]
    cuts: tuple[Cut, ...]
    member: tuple[int, int] = (0, 1)  # which of how many it is, that GGUF has as one stack
    may_lack: bool = False  # whether zeros take its place where it is not stored


# Of a layer, or of None for what belongs to none: Hugging Face name without `model.layers.N.` -> tensor
Cuts = Callable[[int | None], Mapping[str, Stored]]


def no_cuts(layer: int | None) -> Mapping[str, Stored]:
    """Return nothing, for a family whose tensors are as the common rules have them."""
    return {}


def whole(
    stem: str, shape: tuple[int, ...], columns: Iterable[int] = (), *, may_lack: bool = False
) -> Stored:
    """Return a tensor that GGUF has in one piece, with its groups of columns moved where some are given."""
    height = shape[0] if len(shape) == 1 else prod(shape[:-1])
    return Stored(shape, (Cut(stem, shape, (0,), height, tuple(columns)),), may_lack=may_lack)


def stacked(stem: str, shape: tuple[int, ...], i: int, n: int) -> Stored:
    """Return matrix `i` of `n` that GGUF has as one stack."""
    cut = Cut(stem, (n, *shape), (0,), shape[0])
    return Stored(shape, (cut,), member=(i, n))
