"""Task arithmetic, TIES, DARE, DELLA and breadcrumbs: base + lambda * combine(prune(expert - base)).

A method here is a way to prune task vectors and a way to sum what is left. The sum elects one sign per weight
(TIES) or does not. `_method` makes a record of the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from edgemerge.errors import RecipeError
from edgemerge.methods.addition import ADDING, add_whole
from edgemerge.methods.blocks import (
    ELECTION_TILE,
    SUM_LANES,
    Block,
    BlockStream,
    model_weights,
)
from edgemerge.methods.calibration import (
    SVC,
    SVC_RANK,
    calibrate,
    calibrating_kernels,
    calibration_memory,
    calibration_passes,
    is_calibrated,
)
from edgemerge.methods.copies import Adder, Copies
from edgemerge.methods.method import Described, Method, WorkingMemory
from edgemerge.methods.parameters import EPSILON, INT8_MASK, LAMBDA, NORMALIZE, RESCALE, WEIGHT
from edgemerge.methods.pruning import NothingLeft, Pruner
from edgemerge.methods.prunings import BAND, BY_RANK, LARGEST, NO_PRUNING, RANDOM, Pruning
from edgemerge.native import KernelFile
from edgemerge.types import Float32, Setting, TensorJob

__all__ = ["TASK_VECTOR_METHODS"]

linear, norms, ties = KernelFile("linear"), KernelFile("norms"), KernelFile("ties")

TINY_NORM = 1e-7  # mergekit rescales nothing whose norm is below this
TINY_WEIGHT = 1e-8


@dataclass(frozen=True, slots=True)
class TaskVectors:
    """What a method does: prunes task vectors in one way, and adds them or elects signs."""

    pruning: Pruning
    elect: bool

    def blocks(self, stream: BlockStream) -> Iterator[tuple[Block, Float32]]:
        """Yield every block with its merged values; see `Method.blocks`."""
        if not self.takes_deltas(stream.job):
            factors, scale = self._factors(stream.job), float(stream.job.settings["lambda"])
            yield from add_whole(stream, factors, scale)
            return
        pruners, scale = self._survey(stream), float(stream.job.settings["lambda"])
        add = self._adder(stream, pruners)
        if is_calibrated(stream.job):
            copies = Copies(stream)

            def merged(block: Block) -> Float32:
                _prune(block, pruners)
                return copies.merge(block, add)

            yield from calibrate(stream, merged, scale, _scales(pruners))
            return
        for block in stream.blocks():
            assert block.base is not None
            _prune(block, pruners)
            add(scale, block, block.experts, block.base)
            yield block, block.base

    def _adder(self, stream: BlockStream, pruners: list[Pruner]) -> Adder:
        """Return what adds pruned task vectors, or those of each sign's majority, to rows."""
        factors, normalize = self._factors(stream.job), bool(stream.job.settings["normalize"])
        scales = _scales(pruners)
        if not self.elect:
            return lambda scale, _, deltas, rows: linear.add_deltas(
                factors, scales, scale, deltas, rows
            )
        election = stream.take((3, ELECTION_TILE), np.float32)
        return lambda scale, _, deltas, rows: ties.elect(
            factors, scales, normalize, scale, election, deltas, rows
        )

    def _factors(self, job: TensorJob) -> Float32:
        weights = model_weights(job)
        if job.settings["normalize"] and not self.elect:  # an election divides for each weight
            total = float(weights.sum())
            weights = weights / (total if abs(total) >= TINY_WEIGHT else 1.0)
        return weights.astype(np.float32)

    def _survey(self, stream: BlockStream) -> list[Pruner]:
        experts = stream.job.experts
        active = {k: e for k, e in enumerate(experts) if self._is_pruned(e.settings)}
        drawn = {k: expert for k, expert in active.items() if float(expert.settings["density"]) > 0}
        nothing: dict[int, Pruner] = {k: NothingLeft() for k in active}
        found = {**nothing, **(self.pruning.survey(stream, drawn) if drawn else {})}
        pruners = [found.get(k, Pruner()) for k in range(len(experts))]
        if drawn and _matches_norms(stream.job):
            _match_norms(stream, pruners)
        return pruners

    def passes(self, tensor: Described) -> int:
        """Count the passes: surveys, one for the norms, those of a calibration, one to merge."""
        calibrating = calibration_passes(tensor)
        if not self._prunes(tensor):
            return calibrating + 1
        return self.pruning.n_surveys + int(_matches_norms(tensor)) + calibrating + 1

    def memory(self, job: TensorJob) -> WorkingMemory:
        """Count the counters or ranks of the survey, the tile of an election, the norms of a row."""
        fixed, per_row = calibration_memory(job)
        fixed += 4 * 3 * ELECTION_TILE if self.elect else 0
        if self._prunes(job):
            fixed, per_row = fixed + self.pruning.memory(job), per_row + 2 * 8
        return WorkingMemory(fixed, per_row)

    def takes_deltas(self, tensor: Described) -> bool:
        """Tell whether task vectors must be there one by one."""
        return self.elect or self._prunes(tensor) or is_calibrated(tensor)

    def keeps_non_finite(self, tensor: Described) -> bool:
        """Tell whether task vectors are added up whole."""
        return not self.takes_deltas(tensor)

    def _prunes(self, tensor: Described) -> bool:
        return any(self._is_pruned(expert.settings) for expert in tensor.experts)

    def _is_pruned(self, settings: Mapping[str, Setting]) -> bool:
        return self.pruning != NO_PRUNING and float(settings["density"]) < 1.0

    def kernels(self) -> tuple[str, ...]:
        """Name all kernels that these may call."""
        pruning = ("norms.row_norms", "gram.add_rows", *self.pruning.kernels)
        adding = (ADDING, "linear.add_deltas")
        summing = ("ties.elect",) if self.elect else adding
        if self.pruning == NO_PRUNING:
            return ("linear.subtract", *summing) if self.elect else (ADDING,)
        return ("linear.subtract", *pruning, *summing)

    def more_kernels(self, tensor: Described) -> tuple[str, ...]:
        """Name those that only a calibration calls."""
        found = calibrating_kernels(tensor)
        return ("linear.subtract", "linear.add_deltas", *found) if found else ()


def _scales(pruners: list[Pruner]) -> Float32:
    return np.array([pruner.scale for pruner in pruners], np.float32)


def _prune(block: Block, pruners: list[Pruner]) -> None:
    """Prune the task vectors of a block in place, unless an earlier pass did."""
    if not block.is_pruned:
        for pruner, delta in zip(pruners, block.experts, strict=True):
            pruner.prune(block, delta)
        block.is_pruned = True


def _matches_norms(tensor: Described) -> bool:
    return tensor.settings["rescale"] in (True, "l1")


def _match_norms(stream: BlockStream, pruners: list[Pruner]) -> None:
    """Scale every pruned task vector back to its L1 norm, as mergekit does since 0.1.0."""
    n_cols = stream.job.out.n_cols
    sums = {
        k: stream.group.row_sum((2,)) for k, own in enumerate(pruners) if type(own) is not Pruner
    }
    rows = stream.take((stream.job.rows_per_block, 2), np.float64).view(np.float64)
    lanes = stream.take((SUM_LANES,), np.float64)
    for block in stream.blocks():
        own = rows[: block.n_rows]
        for k, total in sums.items():
            norms.row_norms(block.experts[k], n_cols, 0, lanes, own)
            pruners[k].prune(block, block.experts[k])
            norms.row_norms(block.experts[k], n_cols, 1, lanes, own)
            total.add(block.number, own)
        block.is_pruned = True
    for k, total in sums.items():
        before, after = total.total()
        if before >= TINY_NORM and after >= TINY_NORM:
            pruners[k].scale = float(before) / float(after)


# -- records -------------------------------------------------------------------------------------


def _check_probabilities(tensor: Described) -> None:
    """Refuse probabilities to keep, density plus or minus epsilon, that are not inside (0, 1)."""
    for expert in tensor.experts:
        if EPSILON.name not in expert.settings:
            continue
        density, epsilon = float(expert.settings["density"]), float(expert.settings["epsilon"])
        if 0 < density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
            raise RecipeError(
                f"density {density} plus or minus epsilon {epsilon} must stay inside (0, 1)",
                field="epsilon",
            )


def _method(
    name: str,
    summary: str,
    source: str,
    pruning: Pruning,
    *,
    elect: bool = False,
    normalize: bool = False,
    rescale: bool = False,
    paper: Mapping[str, Setting] | None = None,
) -> Method:
    work = TaskVectors(pruning, elect)
    return Method(
        name,
        summary,
        source,
        parameters=(
            WEIGHT,
            *pruning.parameters,
            NORMALIZE.by_default(normalize),
            *([] if pruning == NO_PRUNING else [RESCALE.by_default(rescale)]),
            LAMBDA,
            SVC,
            SVC_RANK,
            INT8_MASK,
        ),
        kernels=work.kernels(),
        more_kernels=work.more_kernels,
        blocks=work.blocks,
        needs_base=True,
        passes=work.passes,
        memory=work.memory,
        check=_check_probabilities,
        takes_deltas=work.takes_deltas,
        keeps_non_finite=work.keeps_non_finite,
        presets={} if paper is None else {"paper": paper},
    )


# Defaults are mergekit's (0.1.5).
TASK_VECTOR_METHODS = (
    _method(
        "task_arithmetic",
        "base plus weighted task vectors",
        "Ilharco et al. 2023",
        NO_PRUNING,
        paper={},
    ),
    _method(
        "ties",
        "trim by magnitude, elect signs, mean of those that agree",
        "Yadav et al. 2023",
        LARGEST,
        elect=True,
        normalize=True,
    ),
    _method(
        "dare_linear",
        "drop at random and rescale, then add",
        "Yu et al. 2024",
        RANDOM,
        rescale=True,
    ),
    _method(
        "dare_ties",
        "drop at random and rescale, then elect signs",
        "Yu et al. 2024",
        RANDOM,
        elect=True,
        rescale=True,
        paper={"density": 0.6},
    ),
    _method(
        "della",
        "drop small magnitudes more often, then elect signs",
        "Deep et al. 2024",
        BY_RANK,
        elect=True,
        normalize=True,
        rescale=True,
        paper={"density": 0.6, "epsilon": 0.05},
    ),
    _method(
        "della_linear",
        "drop small magnitudes more often, then add",
        "Deep et al. 2024",
        BY_RANK,
        rescale=True,
    ),
    _method(
        "breadcrumbs",
        "drop the smallest and the very largest changes, then add",
        "Davari and Belilovsky 2024",
        BAND,
        paper={"density": 0.9, "gamma": 0.01},
    ),
    _method(
        "breadcrumbs_ties",
        "drop the smallest and the very largest changes, then elect signs",
        "Davari and Belilovsky 2024",
        BAND,
        elect=True,
    ),
)
