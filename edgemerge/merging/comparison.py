"""How two models, or what two experts changed of their base, compare: tensor by tensor, read by rows."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import reduce

import numpy as np

from edgemerge.budget import floor_bytes
from edgemerge.errors import MismatchError
from edgemerge.finding.cache import folder_name
from edgemerge.formats import open_model
from edgemerge.merging.figures import Sums, TensorFigures
from edgemerge.merging.low_rank import factorise_change, need_bytes
from edgemerge.merging.matrices import count_workers, decoding_kernels, work_on_all
from edgemerge.merging.verdicts import Verdict, judge
from edgemerge.methods.blocks import SUM_LANES
from edgemerge.methods.grams import GRAM_KERNELS
from edgemerge.native import KernelFile
from edgemerge.native.store import compile_missing
from edgemerge.planning.differences import PIECE, Change, list_changes
from edgemerge.planning.vocabulary import compare_tokenizers
from edgemerge.types import Float32, Progress, Source

__all__ = ["Comparison", "compare"]

gram = KernelFile("gram")

ROWS = 3  # vectors of a Gram matrix: left, right, and their difference or the base


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a comparison found."""

    names: tuple[str, ...]  # of A, B, and the base where it was given
    tensors: tuple[TensorFigures, ...]
    total: Sums  # of all matrices; of all tensors where there is no matrix
    verdicts: tuple[Verdict, ...]  # the most important first
    notes: tuple[str, ...]
    workers: int


def compare(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    memory: int | None = None,
    threads: int = 1,
    reserve: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """Compare two models with each other, or what they changed of a base.

    The effective rank is an estimate of the stable rank, the squared Frobenius norm over the squared spectral
    norm (Rudelson and Vershynin 2007). The spectral norm is that of 32 random directions after a power step
    (Halko, Martinsson and Tropp 2011), which is never above the true one. So the estimate is no lower.

    Parameters
    ----------
    a, b, base : path
        GGUF files or directories; with adapters, as BASE+ADAPTER.
    memory : int, optional
        Budget in bytes for the whole process, by default 512 MiB.
    threads : int
        Matrices at the same time at most. The figures are the same.
    reserve : int
        Bytes of the budget that are left to what follows, such as drawing.
    progress : callable, optional
        Called with elements done and elements in all, from this thread; may raise to stop.

    Raises
    ------
    MismatchError, FormatError, BudgetError
        See `edgemerge.errors`.
    """
    floor = floor_bytes() + reserve
    with ExitStack() as stack:
        paths = (a, b) if base is None else (a, b, base)
        sources = [stack.enter_context(closing(open_model(path))) for path in paths]
        pairs, notes = _list_pairs(sources)
        needs = [one.need_bytes() for one in pairs]
        n_workers = count_workers(sources, needs, floor, memory, threads, what="this comparison")
        kernels = decoding_kernels(sources) | {*GRAM_KERNELS, "lora.add_product"}
        compile_missing(kernels)
        sizes = [math.prod(one.shape) for one in pairs]
        found = work_on_all(pairs, sizes, _measure, n_workers, progress)
        for source in sources:
            source.check_unchanged()
        tensors = _join_stacks(found)
        total = _total(tensors)
        tokens = _compare_tokens(sources)
        names = _names(sources)
    verdicts = judge(tensors, total, names, tokens, has_base=base is not None)
    return Comparison(names, tensors, total, verdicts, notes, n_workers)


# -- what is compared ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Pair:
    """The same matrix of both models: B's change of A, or both models' changes of the base."""

    changes: tuple[Change, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.changes[0].shape

    def need_bytes(self) -> int:
        """Bytes that measuring takes: all that is read of a piece, its three vectors, and the ranks."""
        beside = 6 * 4 * max(PIECE, self.shape[-1])
        blocks = sum(one.block_bytes() for one in self.changes) + beside
        return blocks + (need_bytes((self.shape[0], self.shape[1]), 1) if self.is_matrix else 0)

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) > 1

    def blocks(self, stop: threading.Event) -> Iterator[tuple[Float32, Float32, Float32, int]]:
        """Yield left, right, the third (right - left, or the base), and how many of A and B are equal."""
        if len(self.changes) == 1:
            for _, a, b in self.changes[0].pairs(stop):
                yield a, b, b - a, int(np.count_nonzero(a == b))
            return
        first, second = (change.pairs(stop) for change in self.changes)
        for (_, base, a), (_, _, b) in zip(first, second, strict=True):
            yield a - base, b - base, base, int(np.count_nonzero(a == b))


def _list_pairs(sources: Sequence[Source]) -> tuple[list[_Pair], tuple[str, ...]]:
    """Pair the matrices of A and B, or of their changes of a base."""
    a, b, *rest = sources
    if not rest:
        changes, notes = list_changes(a, b, by_text=True)
        return [_Pair((one,)) for one in changes], tuple(dict.fromkeys(notes))
    firsts, notes = list_changes(rest[0], a, by_text=True)
    seconds, more = list_changes(rest[0], b, by_text=True)
    by_key = {(one.name, one.number): one for one in seconds}
    pairs = [
        _Pair((one, by_key[one.name, one.number]))
        for one in firsts
        if (one.name, one.number) in by_key
    ]
    names = {one.name for one in firsts} ^ {one.name for one in seconds}
    told = " ".join((*notes, *more))  # of a tensor whose rows differ in number
    alone = [
        f"{name} is left out, as only one expert has it"
        for name in sorted(names)
        if f"{name} is left out" not in told
    ]
    return pairs, tuple(dict.fromkeys((*notes, *more, *alone)))


def _compare_tokens(sources: Sequence[Source]) -> list[str]:
    """Say how vocabularies differ from that of the base, or of A."""
    owner = sources[-1] if len(sources) > 2 else sources[0]
    others = (source for source in sources if source is not owner)
    return [said for other in others for said in compare_tokenizers(owner, other)]


def _names(sources: Sequence[Source]) -> tuple[str, ...]:
    """Name models by their last part, where that tells them apart."""
    names = tuple(folder_name(source.path) for source in sources)
    return names if len({*names}) == len(names) else tuple(str(s.path) for s in sources)


# -- the figures -----------------------------------------------------------------------------------


def _measure(pair: _Pair, stop: threading.Event) -> TensorFigures:
    try:
        total = reduce(Sums.__add__, (_sum_up(pair, *block) for block in pair.blocks(stop)))
        ranks = tuple(_stable_rank(change, stop) for change in pair.changes)
    finally:
        for change in pair.changes:
            change.forget()
    return TensorFigures(pair.changes[0].name, pair.shape, total, ranks)


def _sum_up(pair: _Pair, left: Float32, right: Float32, third: Float32, equal: int) -> Sums:
    """Sum a block up. Gram matrices are summed by row in a fixed order, so they are the same everywhere."""
    n_rows, n_cols = left.shape
    lanes, rows = np.empty(SUM_LANES), np.empty((n_rows, ROWS, ROWS))
    stacked = np.stack([left, right, third]).reshape(ROWS, -1)
    gram.row_grams(stacked, n_cols, lanes, rows)
    grams = np.zeros(ROWS * ROWS)
    gram.add_rows(rows.reshape(n_rows, -1), grams)
    signs = np.sign(left) * np.sign(right)
    both, same = int(np.count_nonzero(signs)), int(np.count_nonzero(signs > 0))
    kept = (0, 0)
    if len(pair.changes) > 1:
        kept = int(np.count_nonzero(left == 0)), int(np.count_nonzero(right == 0))
    return Sums(left.size, grams.reshape(ROWS, ROWS), equal, kept, both, same)


def _stable_rank(change: Change, stop: threading.Event) -> float | None:
    """Estimate the stable rank of a matrix's change; None of a vector, or where nothing changed."""
    if change.is_vector:
        return None
    factors = factorise_change(change, stop, rank=1, energy=None)
    return None if factors is None else factors.total / factors.kept


def _join_stacks(found: Sequence[TensorFigures]) -> tuple[TensorFigures, ...]:
    """Join the matrices of a stack of experts: their sums, and the mean of their ranks."""
    stacks: dict[str, list[TensorFigures]] = {}
    for one in found:
        stacks.setdefault(one.name, []).append(one)
    return tuple(
        TensorFigures(
            name,
            parts[0].shape,
            reduce(Sums.__add__, (part.sums for part in parts)),
            tuple(map(_mean, zip(*(part.ranks for part in parts), strict=True))),
        )
        for name, parts in stacks.items()
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _total(tensors: Sequence[TensorFigures]) -> Sums:
    if not tensors:
        raise MismatchError("the models have no tensor that can be compared")
    matrices = [one.sums for one in tensors if len(one.shape) > 1]
    return reduce(Sums.__add__, matrices or [one.sums for one in tensors])
