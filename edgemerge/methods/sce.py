"""SCE (Wan et al. 2024): select elements by variance, weight models by their squares, erase minorities."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edgemerge.methods.blocks import SUM_LANES, Block, BlockStream
from edgemerge.methods.calibration import (
    SVC,
    SVC_RANK,
    calibrate,
    calibrating_kernels,
    calibration_memory,
    calibration_passes,
    is_calibrated,
)
from edgemerge.methods.copies import Copies
from edgemerge.methods.method import Described, Method, WorkingMemory, always
from edgemerge.methods.parameters import INT8_MASK, Parameter
from edgemerge.methods.pruning import NothingLeft, Pruner
from edgemerge.methods.selection import COUNTER_BYTES, Select, place_pruner
from edgemerge.native import KernelFile
from edgemerge.types import Float32, Float64, TensorJob

__all__ = ["SCE"]

gram, sce, select = KernelFile("gram"), KernelFile("sce"), KernelFile("select")

TINY_ENERGY = 1e-6  # sum of mean squares below which all models weigh the same (mergekit 0.1.5)
VARIANCE = 0  # key of the only array that is ranked


class _Selection:
    """Zeroes the elements that vary little between the models, or none of them."""

    def __init__(self, stream: BlockStream) -> None:
        self._pruner = Pruner()
        self.is_needed = float(stream.job.settings["select_topk"]) < 1.0
        if self.is_needed:
            rows = max(1, stream.job.rows_per_block)
            self._work = stream.take((rows * stream.job.n_cols,), np.float32).view(np.float32)
            self._pruner = self._survey(stream)

    def _survey(self, stream: BlockStream) -> Pruner:
        if not _selects(stream.job):
            return NothingLeft()
        topk = float(stream.job.settings["select_topk"])
        found = Select(stream, [VARIANCE])
        zeros = stream.take((1,), np.uint32).view(np.uint32)
        zeros[:] = 0
        ties = np.empty(2, np.int64)
        for block in stream.blocks():
            values = self._variances(block)
            found.count_high(VARIANCE, values)
            select.count_ties(0, 0, values, ties)
            zeros += np.uint32(ties[0])
        stream.group.add_counts(zeros)
        n = stream.job.out.n_elements
        k = _count(n - int(zeros[0]), topk)
        rank = n - max(1, k)
        found.choose({VARIANCE: [rank]})
        for block in stream.blocks():
            found.count_low(VARIANCE, self._variances(block))
        place = found.places()[VARIANCE, rank]
        return place_pruner(stream, place) if k else NothingLeft()

    def apply(self, block: Block) -> None:
        """Zero what is not selected in a block's task vectors."""
        if self.is_needed and not block.is_pruned:
            values = self._variances(block)
            self._pruner.prune(block, values)
            sce.keep_marked(values, block.experts)
            block.is_pruned = True

    def _variances(self, block: Block) -> Float32:
        values = self._work[: block.n_rows * block.n_cols]
        sce.variances(block.experts, values)
        return values


def _count(n_varying: int, topk: float) -> int:
    """Return how many elements are selected; in float32, as mergekit's product of tensors is."""
    return min(n_varying, int(np.float32(n_varying) * np.float32(topk)))


def _merge(stream: BlockStream) -> Iterator[tuple[Block, Float32]]:
    selection = _Selection(stream)
    weights = _weigh(stream, selection).astype(np.float32)
    if is_calibrated(stream.job):
        copies = Copies(stream)

        def merged(block: Block) -> Float32:
            selection.apply(block)
            change = copies.zeros(block)
            sce.add_agreeing(weights, block.experts, change)
            return change

        yield from calibrate(stream, merged, 1.0)
        return
    for block in stream.blocks():
        assert block.base is not None
        selection.apply(block)
        sce.add_agreeing(weights, block.experts, block.base)
        yield block, block.base


def _weigh(stream: BlockStream, selection: _Selection) -> Float64:
    """Return each model's part of the mean squares of what is selected, (n_models,)."""
    n_models = len(stream.job.experts)
    sums = [stream.group.row_sum((1, 1)) for _ in range(n_models)]
    rows = stream.take((max(1, stream.job.rows_per_block), 1, 1), np.float64).view(np.float64)
    lanes = stream.take((SUM_LANES,), np.float64)
    for block in stream.blocks():
        selection.apply(block)
        for k, total in enumerate(sums):
            own = rows[: block.n_rows]
            gram.row_grams(block.experts[k : k + 1], block.n_cols, lanes, own)
            total.add(block.number, own)
    energies = np.array([total.total()[0, 0] for total in sums]) / stream.job.out.n_elements
    total_energy = 0.0
    for energy in energies:  # one after the other
        total_energy += float(energy)
    if total_energy < TINY_ENERGY:
        return np.full(n_models, 1.0 / n_models)
    with np.errstate(invalid="ignore"):  # task vectors that overflowed: the result shows it
        return np.asarray(energies / total_energy)


def _selects(tensor: Described) -> bool:
    return 0.0 < float(tensor.settings["select_topk"]) < 1.0


def _passes(tensor: Described) -> int:
    return calibration_passes(tensor) + (4 if _selects(tensor) else 2)


def _memory(job: TensorJob) -> WorkingMemory:
    fixed, per_row = calibration_memory(job)
    fixed += COUNTER_BYTES if _selects(job) else 0
    return WorkingMemory(fixed, per_row + 8 + 4 * job.n_cols)  # the squares and variances of a row


SCE = Method(
    "sce",
    "keep what varies most between the models, weight them by its squares, elect signs",
    "Wan et al. 2024",
    parameters=(
        Parameter("select_topk", "fraction of the varying elements to keep", 1.0, "fraction"),
        SVC,
        SVC_RANK,
        INT8_MASK,
    ),
    kernels=(
        "linear.subtract",
        "gram.row_grams",
        "gram.add_rows",
        "select.count_high",
        "select.count_low",
        "select.count_ties",
        "select.find_tie",
        "select.keep_between",
        "sce.variances",
        "sce.keep_marked",
        "sce.add_agreeing",
    ),
    blocks=_merge,
    needs_base=True,
    passes=_passes,
    memory=_memory,
    takes_deltas=always,
    more_kernels=calibrating_kernels,
)
