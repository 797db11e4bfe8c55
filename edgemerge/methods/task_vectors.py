"""Task arithmetic, TIES, DARE, DELLA and breadcrumbs: base + lambda * combine(prune(expert - base)).

A method here is a way to prune task vectors and a way to sum what is left. The sum elects one sign per weight
(TIES) or does not. `_method` makes a record of the two.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgemerge.errors import RecipeError
from edgemerge.methods.blocks import (
    ELECTION_TILE,
    RANK_BINS,
    SUM_LANES,
    Block,
    BlockStream,
    least_overflow,
    model_weights,
)
from edgemerge.methods.method import Described, Method, WorkingMemory
from edgemerge.methods.parameters import (
    DENSITY,
    EPSILON,
    GAMMA,
    INT8_MASK,
    LAMBDA,
    NORMALIZE,
    RESCALE,
    WEIGHT,
    Parameter,
)
from edgemerge.methods.pruning import NothingLeft, Pruner, RandomPruner, RankPruner
from edgemerge.methods.selection import COUNTER_BYTES, select_cuts
from edgemerge.native import KernelFile
from edgemerge.types import Float32, InputTensor, Setting, TensorJob

__all__ = ["TASK_VECTOR_METHODS"]

linear, norms, ties = KernelFile("linear"), KernelFile("norms"), KernelFile("ties")

TINY_NORM = 1e-7  # mergekit rescales nothing whose norm is below this
TINY_WEIGHT = 1e-8
SAMPLED_ROWS = 64  # of a tensor, by which experts are told apart: a hundredth of a large matrix

Drawn: TypeAlias = dict[
    int, InputTensor
]  # index of an expert -> its tensor, with a density in (0, 1)


def _no_bytes(tensor: Described) -> int:
    return 0


def _prune_nothing(stream: BlockStream, drawn: Drawn) -> dict[int, Pruner]:
    return {}


@dataclass(frozen=True, slots=True)
class Pruning:
    """A way to prune task vectors."""

    survey: Callable[[BlockStream, Drawn], dict[int, Pruner]] = _prune_nothing
    n_surveys: int = 0  # passes that `survey` makes over the blocks
    memory: Callable[[Described], int] = _no_bytes  # fixed bytes that it takes
    kernels: tuple[str, ...] = ()
    parameters: tuple[Parameter, ...] = ()


@dataclass(frozen=True, slots=True)
class TaskVectors:
    """What a method does: prunes task vectors in one way, and adds them or elects signs."""

    pruning: Pruning
    elect: bool

    def blocks(self, stream: BlockStream) -> Iterator[tuple[Block, Float32]]:
        """Yield every block with its merged values; see `Method.blocks`."""
        if not self.takes_deltas(stream.job):
            yield from self._sum_whole(stream)
            return
        job = stream.job
        factors, scale = self._factors(job), float(job.settings["lambda"])
        normalize = bool(job.settings["normalize"])
        pruners = self._survey(stream)
        scales = np.array([pruner.scale for pruner in pruners], np.float32)
        election = stream.take((3, ELECTION_TILE), np.float32) if self.elect else None
        for block in stream.blocks():
            assert block.base is not None
            if not block.is_pruned:
                for pruner, delta in zip(pruners, block.experts, strict=True):
                    pruner.prune(block, delta)
            if election is not None:
                ties.elect(factors, scales, normalize, scale, election, block.experts, block.base)
            else:
                linear.add_deltas(factors, scales, scale, block.experts, block.base)
            yield block, block.base

    def _sum_whole(self, stream: BlockStream) -> Iterator[tuple[Block, Float32]]:
        """Add up task vectors of which nothing is pruned, without making them one by one."""
        factors, scale = self._factors(stream.job), float(stream.job.settings["lambda"])
        limit, n_overflows = least_overflow(stream.job.out.dtype), np.empty(1, np.int64)
        for block in stream.blocks():
            assert block.base is not None
            linear.add_changes(factors, scale, block.experts, limit, n_overflows, block.base)
            block.n_overflows = int(n_overflows[0])
            yield block, block.base

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
        """Count the passes: surveys, one for the norms, one to merge."""
        if not self._prunes(tensor):
            return 1
        return self.pruning.n_surveys + int(_matches_norms(tensor)) + 1

    def memory(self, tensor: Described) -> WorkingMemory:
        """Count the counters or ranks of the survey, the tile of an election, the norms of a row."""
        election = 4 * 3 * ELECTION_TILE if self.elect else 0
        if not self._prunes(tensor):
            return WorkingMemory(election)
        return WorkingMemory(election + self.pruning.memory(tensor), 2 * 8)

    def takes_deltas(self, tensor: Described) -> bool:
        """Tell whether task vectors must be there one by one."""
        return self.elect or self._prunes(tensor)

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
        adding = ("linear.add_changes", "linear.add_deltas")
        summing = ("ties.elect",) if self.elect else adding
        if self.pruning == NO_PRUNING:
            return ("linear.subtract", *summing) if self.elect else ("linear.add_changes",)
        return ("linear.subtract", *pruning, *summing)


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


# -- ways to prune -------------------------------------------------------------------------------


def _keep_largest(stream: BlockStream, drawn: Drawn) -> dict[int, Pruner]:
    return select_cuts(stream, drawn, band=False)


def _keep_band(stream: BlockStream, drawn: Drawn) -> dict[int, Pruner]:
    return select_cuts(stream, drawn, band=True)


def _counters(tensor: Described) -> int:
    return COUNTER_BYTES * len(tensor.experts)


def _keep_random(stream: BlockStream, drawn: Drawn) -> dict[int, Pruner]:
    keys = _random_keys(stream, drawn)
    return {k: _random_pruner(stream, k, keys[k], expert, None) for k, expert in drawn.items()}


def _keep_by_rank(stream: BlockStream, drawn: Drawn) -> dict[int, Pruner]:
    if not drawn:
        return {}
    keys = _random_keys(stream, drawn)
    ranking = stream.take((_n_ranks(stream.job),), np.uint32).view(np.uint32)
    return {k: _random_pruner(stream, k, keys[k], expert, ranking) for k, expert in drawn.items()}


def _n_ranks(tensor: Described) -> int:
    return 5 * tensor.n_cols + RANK_BINS + 1


def _rank_bytes(tensor: Described) -> int:
    return 4 * _n_ranks(tensor)


def _random_pruner(
    stream: BlockStream,
    k: int,
    key: int,
    expert: InputTensor,
    ranking: NDArray[np.uint32] | None,
) -> Pruner:
    density = float(expert.settings["density"])
    unbiased = stream.job.settings["rescale"] == "expectation"
    if ranking is not None:
        return RankPruner(key, density, float(expert.settings["epsilon"]), unbiased, ranking)
    pruner = RandomPruner(key, density)
    if unbiased:
        pruner.scale = 1.0 / density
    return pruner


def _random_keys(stream: BlockStream, drawn: Drawn) -> dict[int, int]:
    """Hash what masks may depend on: seed, tensor, and a sample of each expert's task vector.

    Never the order of models, tensors, blocks or threads, nor paths. Another stage of a chain has other task
    vectors, so other masks. Experts whose samples are equal are numbered, as their masks must differ too.
    """
    if not drawn:
        return {}
    start = f"{stream.seed}|{stream.job.out.name}|".encode()
    hashes = {k: hashlib.blake2b(start, digest_size=8) for k in drawn}
    for block in stream.sample(SAMPLED_ROWS):
        for k, digest in hashes.items():
            digest.update(block.experts[k])
    keys: dict[int, int] = {}
    seen: Counter[bytes] = Counter()
    for k, digest in hashes.items():
        sample = digest.digest()
        digest.update(seen[sample].to_bytes(4, "little"))
        seen[sample] += 1
        keys[k] = int.from_bytes(digest.digest(), "little")
    return keys


SELECT = ("count_high", "count_low", "count_ties", "find_tie", "keep_between")
SELECT_KERNELS = tuple(f"select.{name}" for name in SELECT)

NO_PRUNING = Pruning()
LARGEST = Pruning(_keep_largest, 2, _counters, SELECT_KERNELS, (DENSITY,))
BAND = Pruning(_keep_band, 2, _counters, SELECT_KERNELS, (DENSITY, GAMMA))
RANDOM = Pruning(_keep_random, kernels=("dare.drop_random",), parameters=(DENSITY,))
BY_RANK = Pruning(_keep_by_rank, 0, _rank_bytes, ("della.drop_by_rank",), (DENSITY, EPSILON))


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
            INT8_MASK,
        ),
        kernels=work.kernels(),
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
