"""What survives of a task vector: nothing, a random part, or what lies between two magnitudes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgemerge.methods.blocks import Block
from edgemerge.methods.shared_tensor import RowSum
from edgemerge.native import KernelFile
from edgemerge.types import Float32

__all__ = ["EVERYTHING", "Cut", "CutPruner", "NothingLeft", "Pruner", "RandomPruner", "RankPruner"]

dare, della, select = KernelFile("dare"), KernelFile("della"), KernelFile("select")

EVERYTHING = 0x7FFFFFFF  # above every magnitude


class Pruner:
    """Decides which entries of one task vector survive; this one keeps all of them."""

    scale = 1.0  # of what survives

    def prune(self, block: Block, delta_f32: Float32) -> None:
        """Zero what is dropped of this block's rows."""


class NothingLeft(Pruner):
    """Density zero."""

    def prune(self, block: Block, delta_f32: Float32) -> None:
        """Drop everything."""
        delta_f32[:] = 0


class RandomPruner(Pruner):
    """DARE: an independent draw per element."""

    def __init__(self, key: int, density: float) -> None:
        self.key = np.uint64(key)
        self.threshold = np.uint64(math.ceil(density * (1 << 24)))

    def prune(self, block: Block, delta_f32: Float32) -> None:
        """Draw by flat index."""
        dare.drop_random(self.key, np.uint64(block.first), self.threshold, delta_f32)


class RankPruner(Pruner):
    """DELLA: a draw whose probability grows with the magnitude's rank in its row."""

    def __init__(
        self, key: int, density: float, epsilon: float, unbiased: bool, scratch: NDArray[np.uint32]
    ) -> None:
        self.key = np.uint64(key)
        self.density, self.epsilon = density, epsilon
        self.unbiased = unbiased  # divide what is kept by its own probability
        self.scratch = scratch

    def prune(self, block: Block, delta_f32: Float32) -> None:
        """Draw by flat index and rank; with `unbiased`, rescale at once."""
        della.drop_by_rank(
            self.key,
            np.uint64(block.first),
            block.n_cols,
            self.density,
            self.epsilon,
            self.unbiased,
            self.scratch,
            delta_f32,
        )


@dataclass(frozen=True, slots=True)
class Cut:
    """A magnitude (as bits), and those of its ties that are kept: [first, stop) in flat index order."""

    magnitude: int
    first: int
    stop: int


class CutPruner(Pruner):
    """TIES and Breadcrumbs: keep the magnitudes between two exact order statistics."""

    def __init__(self, low: Cut, high: Cut, n_before: RowSum) -> None:
        self._cuts = low, high
        self._n_before = n_before
        self._ties: dict[int, NDArray[np.int64]] = {}  # by block: ties before it, and in it

    def prune(self, block: Block, delta_f32: Float32) -> None:
        """Compare magnitudes; of ties keep those whose turn it is."""
        if block.number not in self._ties:
            self._ties[block.number] = self._count(block, delta_f32)
        before, own = self._ties[block.number]
        kept = [cut.first <= n < cut.stop for cut, n in zip(self._cuts, before, strict=True)]
        turns = []  # index from which on ties of a cut are kept, or are not
        for i, cut in enumerate(self._cuts):
            for edge in (cut.first, cut.stop):
                if before[i] < edge < before[i] + own[i]:
                    index = np.empty(1, np.int64)
                    select.find_tie(cut.magnitude, edge - before[i], delta_f32, index)
                    turns.append((int(index[0]), i, cut.first <= edge < cut.stop))
        low, high = self._cuts
        start = 0
        for stop, i, is_kept in [*sorted(turns), (delta_f32.size, 0, False)]:
            least, most = low.magnitude + (not kept[0]), high.magnitude - (not kept[1])
            select.keep_between(least, most, delta_f32[start:stop])
            kept[i] = is_kept
            start = stop

    def _count(self, block: Block, delta_f32: Float32) -> NDArray[np.int64]:
        low, high = self._cuts
        own = np.empty(2, np.int64)
        select.count_ties(low.magnitude, high.magnitude, delta_f32, own)
        # Counts below 2^32 are exact in float64.
        before = self._n_before.add(block.number, own.astype(np.float64).reshape(1, 2))
        return np.stack([before.astype(np.int64), own])
