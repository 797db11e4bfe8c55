"""peft's ways to make one tensor of several: `peft/utils/merge_utils.py`, by rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgemerge.native import KernelFile
from edgemerge.types import Float32

__all__ = ["KINDS", "Rows", "Rule", "merge_rows"]

KINDS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")

dare = KernelFile("dare")

Rows: TypeAlias = Callable[[], Iterator[tuple[int, list[Float32]]]]
"""Each call reads all tensors once: yields a first row, and the same rows (n_rows, n_cols) of each."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How several tensors become one."""

    kind: str  # one of KINDS
    density: float = 1.0  # part of the elements that is kept of each
    by_count: bool = False  # the sign of the greater number wins, instead of that of the sum

    @property
    def prunes(self) -> bool:
        """Whether the smallest magnitudes are dropped."""
        return self.kind in ("ties", "magnitude_prune") and self.density < 1

    @property
    def drops(self) -> bool:
        """Whether elements are dropped at random, and the others divided by the density."""
        return self.kind in ("dare_linear", "dare_ties") and self.density < 1


def merge_rows(
    rows: Rows, rule: Rule, weights: Sequence[float], shape: tuple[int, int], keys: Sequence[int]
) -> Callable[[], Iterator[tuple[int, Float32]]]:
    """Return what reads the result by rows.

    Parameters
    ----------
    rows : Rows
        Reads the tensors.
    rule : Rule
        How they become one.
    weights : sequence of float
        One factor for each tensor.
    shape : (int, int)
        Rows and columns of each.
    keys : sequence of int
        One 64-bit key for each, of the elements that are dropped at random.
    """
    cuts: list[tuple[int, int]] = []
    if rule.prunes:
        n_kept = int(rule.density * shape[0] * shape[1])
        cuts = [_find_cut(rows, i, n_kept) for i in range(len(weights))]

    def read() -> Iterator[tuple[int, Float32]]:
        n_ties = [0] * len(cuts)
        for first, tensors in rows():
            for i, (bits, n_first) in enumerate(cuts):
                n_ties[i] += _prune(tensors[i], bits, n_first - n_ties[i])
            if rule.drops:
                for key, tensor in zip(keys, tensors, strict=True):
                    threshold = int(rule.density * (1 << 24))
                    dare.drop_random(key, first * shape[1], threshold, tensor.reshape(-1))
                    tensor /= np.float32(rule.density)
            yield first, _join(tensors, rule, weights)

    return read


def _join(tensors: Sequence[Float32], rule: Rule, weights: Sequence[float]) -> Float32:
    """Sum the tensors by weight; in the ties methods the mean of those whose sign is the elected one."""
    factors = [np.float32(weight) for weight in weights]
    if not rule.kind.endswith("ties"):
        total = tensors[0] * factors[0]
        for tensor, factor in zip(tensors[1:], factors[1:], strict=True):
            total += tensor * factor
        return total
    votes: Float32 = np.zeros_like(tensors[0])
    for tensor in tensors:
        votes += np.sign(tensor) if rule.by_count else tensor
    elected = np.where(votes >= 0, np.float32(1), np.float32(-1))
    total = np.zeros(votes.shape, np.float32)
    count = np.zeros(votes.shape, np.float32)
    for tensor, factor in zip(tensors, factors, strict=True):
        agrees = np.sign(tensor) == elected
        np.add(total, tensor * factor, out=total, where=agrees)
        count += agrees
    total /= np.maximum(count, 1, out=count)
    return total


def _bits(values_f32: Float32) -> NDArray[np.uint32]:
    """Return the bits of magnitudes, which order as the magnitudes do."""
    bits: NDArray[np.uint32] = values_f32.reshape(-1).view(np.uint32) & np.uint32(0x7FFFFFFF)
    return bits


def _find_cut(rows: Rows, i: int, n_kept: int) -> tuple[int, int]:
    """Find the magnitude of the last element that is kept, and how many of that very magnitude are.

    Two passes: over the upper 16 bits of magnitudes, then over the lower ones where the first pass ends.
    """
    high = np.zeros(1 << 16, np.int64)
    for _, tensors in rows():
        high += np.bincount(_bits(tensors[i]) >> np.uint32(16), minlength=1 << 16)
    above = np.cumsum(high[::-1])[::-1]  # elements of at least this bin
    if n_kept == 0:
        return 1 << 31, 0
    top = int(np.flatnonzero(above >= n_kept)[-1])
    left = n_kept - int(above[top] - high[top])
    low = np.zeros(1 << 16, np.int64)
    for _, tensors in rows():
        bits = _bits(tensors[i])
        inside = bits[bits >> np.uint32(16) == top] & np.uint32(0xFFFF)
        low += np.bincount(inside, minlength=1 << 16)
    above = np.cumsum(low[::-1])[::-1]
    bottom = int(np.flatnonzero(above >= left)[-1])
    return (top << 16) | bottom, left - int(above[bottom] - low[bottom])


def _prune(tensor: Float32, bits: int, n_first: int) -> int:
    """Zero what is below a magnitude, and all but the first elements of it; return how many are of it."""
    own = _bits(tensor)
    flat = tensor.reshape(-1)
    ties = np.flatnonzero(own == bits)
    flat[own < bits] = 0
    flat[ties[max(0, n_first) :]] = 0
    return len(ties)
