"""Exact order statistics and cuts by magnitude: a radix select over a tensor's blocks, in two passes.

A magnitude is 31 bits of a float32. The first pass counts magnitudes by their high 15 bits, which tells the
bin of every rank that is asked for. The second pass counts the low 16 bits inside these bins.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgemerge.methods.blocks import BlockStream
from edgemerge.methods.pruning import EVERYTHING, Cut, CutPruner, NothingLeft, Pruner
from edgemerge.native import KernelFile
from edgemerge.types import Float32, InputTensor

__all__ = ["COUNTER_BYTES", "LOW_BYTES", "Place", "Select", "place_pruner", "select_cuts"]

select = KernelFile("select")

N_HIGH, N_LOW = 1 << 15, 1 << 16  # bins of the two passes
LOW_BYTES = 4 * N_LOW  # for each rank that is asked for
COUNTER_BYTES = 4 * N_HIGH + 2 * LOW_BYTES  # of an array, and two ranks of it


class Place(NamedTuple):
    """An order statistic: its magnitude, and where among its ties the rank falls."""

    magnitude: int  # bits of the float32, without the sign
    number: int  # from 0
    n_ties: int


class Select:
    """Finds magnitudes by their ascending ranks. The two passes are the caller's, over the same arrays.

    Parameters
    ----------
    stream : BlockStream
        Gives the counters, and adds up those of all workers.
    keys : iterable of int
        One for each array that is ranked.
    """

    def __init__(self, stream: BlockStream, keys: Iterable[int]) -> None:
        self._stream = stream
        self._high = {key: self._counters(N_HIGH) for key in keys}
        self._low: dict[tuple[int, int], NDArray[np.uint32]] = {}  # (key, bin of the first pass)
        self._ends: dict[tuple[int, int], tuple[int, int]] = {}  # (key, rank) -> bin, rank in it

    def count_high(self, key: int, values: Float32) -> None:
        """Count a block in the first pass."""
        select.count_high(values, self._high[key])

    def choose(self, ranks: Mapping[int, Sequence[int]]) -> None:
        """End the first pass: say which ascending ranks of each array are wanted."""
        for counts in self._high.values():
            self._stream.group.add_counts(counts)
        for key, wanted in ranks.items():
            for rank in wanted:
                self._ends[key, rank] = _find_bin(self._high[key], rank)
        bins = sorted({(key, index) for (key, _), (index, _) in self._ends.items()})
        self._low = {at: self._counters(N_LOW) for at in bins}

    def count_low(self, key: int, values: Float32) -> None:
        """Count a block in the second pass."""
        for (owner, index), counts in self._low.items():
            if owner == key:
                select.count_low(values, index, counts)

    def places(self) -> dict[tuple[int, int], Place]:
        """End the second pass. Return the place of each (key, rank)."""
        for counts in self._low.values():
            self._stream.group.add_counts(counts)
        return {at: _locate(end, self._low[at[0], end[0]]) for at, end in self._ends.items()}

    def _counters(self, n_bins: int) -> NDArray[np.uint32]:
        counts = self._stream.take((n_bins,), np.uint32).view(np.uint32)
        counts[:] = 0
        return counts


def select_cuts(
    stream: BlockStream, drawn: dict[int, InputTensor], *, band: bool
) -> dict[int, Pruner]:
    """Find the cuts of every expert in two passes over the blocks.

    Parameters
    ----------
    stream : BlockStream
        Of task vectors.
    drawn : dict
        Index of an expert -> its tensor, for those that are pruned.
    band : bool
        Drop the very largest magnitudes too (`gamma`).

    Returns
    -------
    dict
        Index of an expert -> its pruner.
    """
    n = stream.job.out.n_elements
    kept = {k: _kept_ranks(expert, n, band=band) for k, expert in drawn.items()}
    kept = {k: ranks for k, ranks in kept.items() if ranks}
    found = Select(stream, kept)
    for block in stream.blocks():
        for k in kept:
            found.count_high(k, block.experts[k])
    found.choose(kept)
    for block in stream.blocks():
        for k in kept:
            found.count_low(k, block.experts[k])
    places = found.places()
    pruners: dict[int, Pruner] = dict.fromkeys(drawn, NothingLeft())
    for k, ranks in kept.items():
        pruners[k] = place_pruner(stream, *(places[k, rank] for rank in ranks))
    return pruners


def place_pruner(stream: BlockStream, first: Place, last: Place | None = None) -> Pruner:
    """Return a pruner that keeps what lies from a place upwards, up to another one; see `_cuts` for ties."""
    return CutPruner(*_cuts(first, last), stream.group.row_sum((2,)))


def _kept_ranks(expert: InputTensor, n: int, *, band: bool) -> tuple[int, ...]:
    """First ascending rank that is kept, and with a band the last (mergekit sparsify.py, 0.1.5)."""
    density = float(expert.settings["density"])
    if not band:
        return (n - max(1, int(density * n)),)
    target = int(density * n)
    top = int(float(expert.settings["gamma"]) * n)
    bottom = max(0, n - target - top)
    return (bottom, min(n, bottom + target) - 1) if target else ()


def _find_bin(counts: NDArray[np.uint32], rank: int) -> tuple[int, int]:
    """Bin that holds an ascending rank, and the rank inside it."""
    ends = np.cumsum(counts, dtype=np.int64)
    index = int(np.searchsorted(ends, rank, side="right"))
    return index, rank - int(ends[index] - counts[index])


def _locate(at: tuple[int, int], counts: NDArray[np.uint32]) -> Place:
    index, rank = _find_bin(counts, at[1])
    return Place((at[0] << 16) | index, rank, int(counts[index]))


def _cuts(first: Place, last: Place | None) -> tuple[Cut, Cut]:
    """Cuts for the kept ranks, from the first to the last or to the largest.

    TIES keeps the k largest: at its only cut the earlier ties stay. Breadcrumbs is defined by a stable
    ascending sort: at the low cut the later ties stay, at the high cut the earlier ones.
    """
    low, skipped, n_ties = first
    if last is None:
        return Cut(low, 0, n_ties - skipped), Cut(EVERYTHING, 0, 0)
    high, last_kept, _ = last
    if low == high:
        both = Cut(low, skipped, last_kept + 1)
        return both, both
    return Cut(low, skipped, n_ties), Cut(high, 0, last_kept + 1)
