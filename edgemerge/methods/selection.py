"""Exact cuts by magnitude: a radix select over the blocks of a tensor, in two passes.

A magnitude is 31 bits of a float32. The first pass counts magnitudes by their high 15 bits, which tells the
bin of every rank that is asked for. The second pass counts the low 16 bits inside these bins.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgemerge.methods.blocks import BlockStream
from edgemerge.methods.pruning import EVERYTHING, Cut, CutPruner, NothingLeft, Pruner
from edgemerge.native import KernelFile
from edgemerge.types import InputTensor

__all__ = ["COUNTER_BYTES", "select_cuts"]

select = KernelFile("select")

N_HIGH, N_LOW = 1 << 15, 1 << 16  # bins of the two passes
COUNTER_BYTES = 4 * (N_HIGH + 2 * N_LOW)  # per expert: a band has two cuts, in two bins


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
    high = {k: _counters(stream, N_HIGH) for k in kept}
    for block in stream.blocks():
        for k, counts in high.items():
            select.count_high(block.experts[k], counts)
    for counts in high.values():
        stream.group.add_counts(counts)
    ends = {(k, rank): _find_bin(high[k], rank) for k, ranks in kept.items() for rank in ranks}
    low = {
        at: _counters(stream, N_LOW) for at in sorted({(k, end[0]) for (k, _), end in ends.items()})
    }
    for block in stream.blocks():
        for (k, index), counts in low.items():
            select.count_low(block.experts[k], index, counts)
    for counts in low.values():
        stream.group.add_counts(counts)
    ties_at = {at: _locate(end, low[at[0], end[0]]) for at, end in ends.items()}
    pruners: dict[int, Pruner] = dict.fromkeys(drawn, NothingLeft())
    for k, ranks in kept.items():
        low_cut, high_cut = _cuts(*(ties_at[k, rank] for rank in ranks))
        pruners[k] = CutPruner(low_cut, high_cut, stream.group.row_sum((2,)))
    return pruners


def _counters(stream: BlockStream, n_bins: int) -> NDArray[np.uint32]:
    counts = stream.take((n_bins,), np.uint32).view(np.uint32)
    counts[:] = 0
    return counts


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


def _locate(at: tuple[int, int], counts: NDArray[np.uint32]) -> tuple[int, int, int]:
    """Magnitude (as bits) of a rank, its place among its ties, and how many ties there are."""
    index, rank = _find_bin(counts, at[1])
    return (at[0] << 16) | index, rank, int(counts[index])


def _cuts(first: tuple[int, int, int], last: tuple[int, int, int] | None = None) -> tuple[Cut, Cut]:
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
