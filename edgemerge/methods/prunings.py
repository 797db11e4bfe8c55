"""Ways to prune task vectors: what each surveys, what it takes, and its parameters.

None; all but the largest magnitudes; all but a band of them; at random; at random by rank.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgemerge.methods.blocks import RANK_BINS, BlockStream
from edgemerge.methods.method import Described
from edgemerge.methods.parameters import DENSITY, EPSILON, GAMMA, Parameter
from edgemerge.methods.pruning import Pruner, RandomPruner, RankPruner
from edgemerge.methods.selection import COUNTER_BYTES, select_cuts
from edgemerge.types import InputTensor

__all__ = ["BAND", "BY_RANK", "LARGEST", "NO_PRUNING", "RANDOM", "Drawn", "Pruning"]

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
