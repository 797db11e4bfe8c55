"""Pruning a task vector: keep nothing, a random part, or all between two magnitudes."""

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
    """Decides which entries of one task vector are kept. This one keeps all of them."""

    scale = 1.0  # factor of what is kept

    def prune(self, block: Block, delta_f32: Float32) -> None:
        """Set the dropped entries of a block to zero.

        Parameters
        ----------
        block : Block
            Tells where the entries are in the tensor.
        delta_f32 : (n_rows * n_cols,) float32
            Task vector of the block's rows, overwritten.
        """


class NothingLeft(Pruner):
    """Density zero."""

    def prune(self, block: Block, delta_f32: Float32) -> None:
        """Drop everything."""
        delta_f32[:] = 0


class RandomPruner(Pruner):
    """DARE: keep each entry with the same probability (Yu et al. 2024)."""

    def __init__(self, key: int, density: float) -> None:
        self.key = np.uint64(key)
        self.threshold = np.uint64(math.ceil(density * (1 << 24)))

    def prune(self, block: Block, delta_f32: Float32) -> None:
        """Draw for each flat index."""
        dare.drop_random(self.key, np.uint64(block.first), self.threshold, delta_f32)


class RankPruner(Pruner):
    """DELLA: keep an entry with a probability that grows with its rank in its row (Deep et al. 2024)."""

    def __init__(
        self, key: int, density: float, epsilon: float, unbiased: bool, scratch: NDArray[np.uint32]
    ) -> None:
        self.key = np.uint64(key)
        self.density, self.epsilon = density, epsilon
        self.unbiased = unbiased
        self.scratch = scratch

    def prune(self, block: Block, delta_f32: Float32) -> None:
        """Draw for each flat index and rank. With `unbiased`, divide by the probability."""
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
    """A magnitude, and which of the entries that have it are kept.

    Attributes
    ----------
    magnitude : int
        Bits of the float32, without the sign.
    first, stop : int
        The kept entries are number `first` to `stop - 1` of those that have the magnitude, by flat index.
    """

    magnitude: int
    first: int
    stop: int


class CutPruner(Pruner):
    """TIES and Breadcrumbs: keep the magnitudes between two exact order statistics.

    Parameters
    ----------
    low, high : Cut
        Entries between the two magnitudes are kept. `edgemerge.methods.selection` finds them.
    n_before : RowSum
        Sum of (2,): entries at each of the two magnitudes, over the tensor's rows. It tells each block how
        many there are in earlier blocks.
    """

    def __init__(self, low: Cut, high: Cut, n_before: RowSum) -> None:
        self._cuts = low, high
        self._n_before = n_before
        self._ties: dict[
            int, NDArray[np.int64]
        ] = {}  # block number -> (2, 2): ties before it, and in it

    def prune(self, block: Block, delta_f32: Float32) -> None:
        """Compare magnitudes, and count off the entries whose magnitude is that of a cut.

        Example: the tensor is 5 -2 | 2 1 -2 2, in two blocks, and TIES keeps the 3 largest of 6. The cut is
        at magnitude 2, where `Cut(2, 0, 2)` keeps the first two of four ties. In the first block no tie
        precedes: 5 and -2 are kept. In the second block one tie precedes. So the 2 at the start is the
        second tie and is kept; 1 is too small; the last two ties are the third and fourth, and dropped.
        The result is 5 -2 | 2 0 0 0. Inside a block the cut falls at one index, `turns`. The entries before
        it are compared with one pair of bounds, and those from it on with another.
        """
        if block.number not in self._ties:
            self._ties[block.number] = self._count(block, delta_f32)
        before, own = self._ties[block.number]
        kept = [cut.first <= n < cut.stop for cut, n in zip(self._cuts, before, strict=True)]
        turns = []  # (index, which cut, whether its ties are kept from there on)
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
