"""What each method does to the blocks of one tensor.

`merged_blocks` drives a tensor from survey to result. It sees blocks of float32 rows and nothing else:
no file, no type, no thread. Everything that spans blocks (a k-th magnitude, a norm, a dot product) is
surveyed first, over the same blocks; sums run per row in float64 and rows in order, and randomness is
a hash of the flat index, so the result is the same for every block height.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from edgemerge.methods.blocks import (
    ELECTION_TILE,
    N_HIGH,
    N_LOW,
    RANK_BINS,
    SUM_LANES,
    Block,
    BlockStream,
    least_beyond,
    model_weights,
)
from edgemerge.methods.hierarchical import hierarchical_blocks
from edgemerge.methods.pruning import (
    EVERYTHING,
    Cut,
    CutPruner,
    NothingLeft,
    Pruner,
    RandomPruner,
    RankPruner,
)
from edgemerge.methods.table import METHODS, is_plain_sum, is_pruned
from edgemerge.native import KernelFile
from edgemerge.types import Float32, Float64, InputTensor, TensorJob

__all__ = ["Block", "BlockStream", "merged_blocks"]

linear, norms, select = KernelFile("linear"), KernelFile("norms"), KernelFile("select")
gram, ties = KernelFile("gram"), KernelFile("ties")

TINY_NORM = 1e-7  # mergekit rescales nothing whose norm is below this
TINY_WEIGHT = 1e-8
PARALLEL = 0.9995  # |cos| above which slerp is lerp, as in mergekit


def merged_blocks(
    stream: BlockStream, shared_gram: Float64 | None = None
) -> Iterator[tuple[Block, Float32]]:
    """Yield every block of a tensor with its merged float32 values, in row order.

    `shared_gram` is what the hierarchical method measured over a whole layer, where its scope asks so.
    """
    method = METHODS[stream.job.method]
    if method.name == "hierarchical":
        return hierarchical_blocks(stream, shared_gram)
    if is_plain_sum(stream.job):
        return _sum_blocks(stream)
    if method.on_deltas:
        return _task_blocks(stream)
    if method.name == "slerp":
        return _slerp_blocks(stream)
    if method.name == "linear":
        return _linear_blocks(stream)
    assert method.name == "passthrough"
    return _scaled_blocks(stream)


# -- linear, passthrough, slerp ------------------------------------------------------------------------


def _linear_blocks(stream: BlockStream) -> Iterator[tuple[Block, Float32]]:
    weights = model_weights(stream.job)
    if stream.job.settings["normalize"]:
        weights = weights / float(weights.sum())  # the plan refuses a sum of zero
    for block in stream.blocks():
        linear.weighted_sum(weights.astype(np.float32), block.experts)
        yield block, block.experts[0]


def _scaled_blocks(stream: BlockStream) -> Iterator[tuple[Block, Float32]]:
    scale = np.array([stream.job.experts[0].settings["scale"]], np.float32)
    for block in stream.blocks():
        linear.weighted_sum(scale, block.experts)
        yield block, block.experts[0]


def _slerp_blocks(stream: BlockStream) -> Iterator[tuple[Block, Float32]]:
    dots = stream.team.row_sum((3,))
    rows = stream.take((stream.job.rows_per_block, 3), np.float64).view(np.float64)
    lanes = stream.take((SUM_LANES,), np.float64)
    for block in stream.blocks():
        own = rows[: block.n_rows]
        gram.row_dots(block.base, block.experts[0], block.n_cols, lanes, own)
        dots.add(block.number, own)
    from_base, from_expert = _slerp_factors(dots.total(), float(stream.job.settings["t"]))
    for block in stream.blocks():
        assert block.base is not None
        linear.weighted_sum(np.array([from_expert], np.float32), block.experts)
        linear.weighted_sum(np.array([from_base], np.float32), block.base.reshape(1, -1))
        linear.add_scaled(block.experts[0], 1.0, block.base)
        yield block, block.base


def _slerp_factors(dots: NDArray[np.float64], t: float) -> tuple[float, float]:
    """Factors of base and expert: Shoemake's, on whole tensors, lerp where they are parallel."""
    norms = [math.sqrt(float(dots[i])) for i in (0, 2)]
    scale = 1.0
    for norm in norms:
        scale *= norm if norm > TINY_WEIGHT else 1.0
    cosine = float(dots[1]) / scale
    if abs(cosine) > PARALLEL:
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


# -- task vectors ---------------------------------------------------------------------------------------


def _task_factors(job: TensorJob) -> Float32:
    weights = model_weights(job)
    if job.settings["normalize"] and not METHODS[job.method].elect:
        total = float(weights.sum())
        weights = weights / (total if abs(total) >= TINY_WEIGHT else 1.0)
    return weights.astype(np.float32)


def _sum_blocks(stream: BlockStream) -> Iterator[tuple[Block, Float32]]:
    factors, scale = _task_factors(stream.job), float(stream.job.settings["lambda"])
    limit, n_beyond = least_beyond(stream.job.out.dtype), np.empty(1, np.int64)
    for block in stream.blocks():
        assert block.base is not None
        linear.add_changes(factors, scale, block.experts, limit, n_beyond, block.base)
        block.n_beyond = int(n_beyond[0])
        yield block, block.base


def _task_blocks(stream: BlockStream) -> Iterator[tuple[Block, Float32]]:
    job = stream.job
    method = METHODS[job.method]
    factors, scale = _task_factors(job), float(job.settings["lambda"])
    normalize = bool(job.settings["normalize"])
    pruners = _survey_pruners(stream)
    scales = np.array([pruner.scale for pruner in pruners], np.float32)
    election = stream.take((3, ELECTION_TILE), np.float32) if method.elect else None
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


def _survey_pruners(stream: BlockStream) -> list[Pruner]:
    job = stream.job
    method = METHODS[job.method]
    active = [k for k, expert in enumerate(job.experts) if is_pruned(method, expert.settings)]
    pruners: list[Pruner] = [Pruner() for _ in job.experts]
    drawn = {k: job.experts[k] for k in active if float(job.experts[k].settings["density"]) > 0}
    for k in active:
        pruners[k] = NothingLeft()
    if method.prune in ("magnitude", "band"):
        for k, pruner in _select_cuts(stream, drawn, band=method.prune == "band").items():
            pruners[k] = pruner
    else:
        ranking = _ranking_memory(stream) if method.prune == "rank" and drawn else None
        for k, expert in drawn.items():
            pruners[k] = _random_pruner(stream, k, expert, ranking)
    if drawn and job.settings["rescale"] in (True, "l1"):
        _match_norms(stream, pruners)
    return pruners


def _ranking_memory(stream: BlockStream) -> NDArray[np.uint32]:
    length = 5 * stream.job.out.n_cols + RANK_BINS + 1
    return stream.take((length,), np.uint32).view(np.uint32)


def _random_pruner(
    stream: BlockStream, k: int, expert: InputTensor, ranking: NDArray[np.uint32] | None
) -> Pruner:
    key = _random_key(stream.seed, k, stream.job.out.name)
    density = float(expert.settings["density"])
    unbiased = stream.job.settings["rescale"] == "expectation"
    if ranking is not None:
        return RankPruner(key, density, float(expert.settings["epsilon"]), unbiased, ranking)
    pruner = RandomPruner(key, density)
    if unbiased:
        pruner.scale = 1.0 / density
    return pruner


def _random_key(seed: int, k: int, tensor: str) -> int:
    """Hash what a mask may depend on: never the order of tensors, blocks, threads or file paths."""
    digest = hashlib.blake2b(f"{seed}|{k}|{tensor}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _match_norms(stream: BlockStream, pruners: list[Pruner]) -> None:
    """Scale every pruned task vector back to its L1 norm, as mergekit does since 0.1.0."""
    n_cols = stream.job.out.n_cols
    sums = {
        k: stream.team.row_sum((2,)) for k, own in enumerate(pruners) if type(own) is not Pruner
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


# -- exact selection --------------------------------------------------------------------------------------


def _select_cuts(
    stream: BlockStream, drawn: dict[int, InputTensor], *, band: bool
) -> dict[int, Pruner]:
    """Find the cuts of every expert in two passes over the blocks."""
    n = stream.job.out.n_elements
    kept = {k: _kept_ranks(expert, n, band=band) for k, expert in drawn.items()}
    kept = {k: ranks for k, ranks in kept.items() if ranks}
    high = {k: _counters(stream, N_HIGH) for k in kept}
    for block in stream.blocks():
        for k, counts in high.items():
            select.count_high(block.experts[k], counts)
    for counts in high.values():
        stream.team.add_counts(counts)
    ends = {(k, rank): _find_bin(high[k], rank) for k, ranks in kept.items() for rank in ranks}
    low = {
        at: _counters(stream, N_LOW) for at in sorted({(k, end[0]) for (k, _), end in ends.items()})
    }
    for block in stream.blocks():
        for (k, index), counts in low.items():
            select.count_low(block.experts[k], index, counts)
    for counts in low.values():
        stream.team.add_counts(counts)
    ties_at = {at: _locate(end, low[at[0], end[0]]) for at, end in ends.items()}
    pruners: dict[int, Pruner] = dict.fromkeys(drawn, NothingLeft())
    for k, ranks in kept.items():
        low_cut, high_cut = _cuts(*(ties_at[k, rank] for rank in ranks))
        pruners[k] = CutPruner(low_cut, high_cut, stream.team.row_sum((2,)))
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
