"""Arcee Fusion: take over the changes of one model that are important, by exact quantiles of importance."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edgemerge.methods.blocks import SUM_LANES, Block, BlockStream
from edgemerge.methods.method import Described, Method, WorkingMemory
from edgemerge.methods.selection import COUNTER_BYTES, LOW_BYTES, Place, Select
from edgemerge.native import KernelFile
from edgemerge.types import Float32, Float64, TensorJob

__all__ = ["ARCEE_FUSION"]

fusion = KernelFile("fusion")

IMPORTANCE = 0  # key of the only array that is ranked


def _fuse(stream: BlockStream) -> Iterator[tuple[Block, Float32]]:
    """Yield the base with the changes of importance `median + 1.5 (upper - lower quartile)` and more.

    mergekit draws a million elements of a larger tensor for its quantiles. Here they are of all.
    """
    job = stream.job
    importance = _Importance(stream)
    n = job.out.n_elements
    ranks = [(n - 1) * quarter // 4 for quarter in (1, 2, 3)]
    found = Select(stream, [IMPORTANCE])
    for block in stream.blocks():
        importance.measure_rows(block)
        found.count_high(IMPORTANCE, importance.of(block))
    found.choose({IMPORTANCE: ranks})
    for block in stream.blocks():
        found.count_low(IMPORTANCE, importance.of(block))
    places = found.places()
    lower, median, upper = (_value(places[IMPORTANCE, rank]) for rank in ranks)
    threshold = median + 1.5 * (upper - lower)
    for block in stream.blocks():
        assert block.base is not None
        fusion.take_important(threshold, importance.of(block), block.experts[0], block.base)
        yield block, block.base


class _Importance:
    """Sizes of changes times the divergence of their row, which is measured in the first pass."""

    def __init__(self, stream: BlockStream) -> None:
        job = stream.job
        rows = max(1, job.rows_per_block)
        self._divergences = stream.take((job.out.n_rows,), np.float64).view(np.float64)
        self._work = stream.take((rows * job.n_cols,), np.float32).view(np.float32)
        self._lanes = stream.take((SUM_LANES,), np.float64)

    def measure_rows(self, block: Block) -> None:
        """Measure the divergences of a block's rows."""
        fusion.row_divergences(
            block.experts[0], block.base, block.n_cols, self._lanes, self._rows(block)
        )

    def of(self, block: Block) -> Float32:
        """Return the importance of each element, overwritten by the next block's."""
        values = self._work[: block.n_rows * block.n_cols]
        fusion.importances(block.experts[0], block.base, block.n_cols, self._rows(block), values)
        return values

    def _rows(self, block: Block) -> Float64:
        first = block.first // block.n_cols
        return self._divergences[first : first + block.n_rows]


def _value(place: Place) -> float:
    return float(np.uint32(place.magnitude).view(np.float32))


def _passes(tensor: Described) -> int:
    return 3


def _memory(job: TensorJob) -> WorkingMemory:
    """Count counters of three ranks, each row's divergence, and importances."""
    return WorkingMemory(COUNTER_BYTES + LOW_BYTES + 8 * job.out.n_rows, 4 * job.n_cols)


ARCEE_FUSION = Method(
    "arcee_fusion",
    "take over one model's changes that are large where its rows changed most",
    "Arcee, mergekit",
    parameters=(),
    kernels=(
        "fusion.row_divergences",
        "fusion.importances",
        "fusion.take_important",
        "select.count_high",
        "select.count_low",
    ),
    blocks=_fuse,
    needs_base=True,
    n_models=(1, 1),
    passes=_passes,
    memory=_memory,
)
