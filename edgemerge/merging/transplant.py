"""A model gets the tokenizer of another: rows of common tokens stay, the others are found by pursuit.

Goddard and Fernandes Neto 2025, "Training-Free Tokenizer Transplantation via Orthogonal Matching Pursuit"
(arXiv 2506.06607), as mergekit-tokensurgeon does it. A token that only the donor has is a combination of
common tokens in the donor's embedding. The same combination of the model's rows is its row.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgemerge.budget import floor_bytes
from edgemerge.errors import BudgetError, MismatchError, OutputError
from edgemerge.finding.cache import folder_name
from edgemerge.formats import open_model
from edgemerge.formats.gguf.metadata import encode_value, get_value
from edgemerge.formats.quants.codec import CODECS, find_codec
from edgemerge.formats.tokenizer.extend import MODEL_KEY, UNITABLE, Extension
from edgemerge.formats.tokenizer.shared import find_shared
from edgemerge.formats.tokenizer.table import TokenTables
from edgemerge.merging.destination import check_destination
from edgemerge.merging.pursuit import Rows, block_bytes, pursue, target_bytes
from edgemerge.merging.run import merge, usable_processors
from edgemerge.merging.soundness import check_finite
from edgemerge.merging.transplanted import NO_ROW, TransplantedModel, stored_spec
from edgemerge.native.store import compile_missing
from edgemerge.output.file import write_all
from edgemerge.output.report import MergeReport
from edgemerge.planning.memory import header_bytes
from edgemerge.planning.plan import DEFAULT_MEMORY
from edgemerge.planning.token_maps import PER_TOKEN
from edgemerge.planning.vocabulary import EMBEDDING, OUTPUT, TOKENS_KEY
from edgemerge.sizes import format_size
from edgemerge.types import (
    BeginPart,
    Float32,
    Progress,
    Recipe,
    Source,
    TensorSpec,
    UInt8,
    ignore_parts,
)

__all__ = ["transplant"]

MIB = 1 << 20
LARGEST_F16 = 65504.0
SPARE = 16 * MIB  # what allocating and freeing large arrays leaves

Int32 = NDArray[np.int32]


def transplant(
    recipe: Recipe,
    output: str | os.PathLike[str],
    *,
    k: int,
    memory: int | None = None,
    threads: int | None = None,
    split_bytes: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
    begin_part: BeginPart = ignore_parts,
) -> MergeReport:
    """Write a model with the tokenizer of another.

    Parameters
    ----------
    recipe : Recipe
        `passthrough` of the model, with the donor's path as `tokenizer_source`.
    output : path
        As of `merge`.
    k : int
        Common tokens that a new token is a combination of, at most.
    memory, threads, split_bytes, force, progress, begin_part
        As of `merge`. The result is the same for every budget and thread count.

    Raises
    ------
    MismatchError
        The vocabularies have too little in common, or tell no texts; a tensor cannot be brought to another.
    FormatError
        An input holds NaN or infinity, which is told before rows are looked for.
    EdgemergeError
        As of `merge`; the output is as it was.
    """
    started, floor, path = time.monotonic(), floor_bytes(), Path(output)
    (target,), donor_path = recipe.models(), Path(str(recipe.tokenizer_source))
    inputs = (*recipe.inputs(), donor_path)
    check_destination(recipe, path, inputs, is_split=split_bytes is not None, force=force)
    with (
        closing(open_model(target)) as model,
        closing(open_model(donor_path)) as donor,
        tempfile.TemporaryFile(dir=path.absolute().parent) as file,
    ):
        work = _find_work(model, donor, k)
        budget = memory or recipe.memory or DEFAULT_MEMORY
        limits = _Limits(floor, budget, threads or usable_processors())
        starts = _make_rows(work, limits, _RowFile(file.fileno(), path), begin_part)
        donor.check_unchanged()
        transplanted = TransplantedModel(model, work.tokenizer, work.rows, starts, file.fileno())
        report = merge(
            recipe,
            path,
            memory=memory,
            threads=threads,
            split_bytes=split_bytes,
            force=force,
            progress=progress,
            begin_part=begin_part,
            opened={target: transplanted, donor_path: donor},
            record={
                "edgemerge.transplant.donor": encode_value(folder_name(donor_path), "str"),
                "edgemerge.transplant.k": encode_value(k, "u32"),
            },
        )
    seconds = time.monotonic() - started
    return replace(report, seconds=seconds, notes=(*work.notes(), *report.notes))


# -- what is to be done ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """Which rows are kept, and which tensors of the donor the others are found in."""

    model: Source
    donor: Source
    k: int
    tokenizer: Mapping[str, bytes]
    rows: Mapping[str, Int32]  # see `TransplantedModel`
    common: Mapping[str, tuple[Int32, Int32]]  # rows of common tokens: the donor's, the model's
    new: Mapping[str, Int32]  # the donor's rows of new tokens

    def donor_name(self, name: str) -> str:
        """Name the donor's tensor: its embedding is its head where it has none."""
        return name if name in self.donor.specs() else EMBEDDING

    def by_donor(self) -> dict[str, list[str]]:
        """Group the model's tensors by that of the donor."""
        groups: dict[str, list[str]] = {}
        for name in self.rows:
            groups.setdefault(self.donor_name(name), []).append(name)
        return groups

    def notes(self) -> Iterator[str]:
        """Say where the rows come from."""
        rows = self.rows[EMBEDDING]
        kept, new = int((rows >= 0).sum()), len(self.new[EMBEDDING])
        yield (
            f"of {len(rows)} tokens, {kept} keep the model's rows, and {new} are combinations of at most "
            f"{self.k} of these"
        )
        if lacking := int((rows == NO_ROW).sum()):
            yield f"{lacking} tokens have no row in the donor, and get zeros"


def _find_work(model: Source, donor: Source, k: int) -> _Work:
    """Match the vocabularies, and refuse what cannot be."""
    for source in (model, donor):
        _check_source(source)
    for name in PER_TOKEN:
        if name in model.specs():
            raise MismatchError(
                f"tensor {name!r} of {model.path} has an entry for each token, which is not brought to "
                "another vocabulary; take a model without it",
                tensor=name,
            )
    tokenizer = Extension(donor.metadata(), TokenTables()).metadata()
    found = find_shared(tokenizer, model.metadata())
    rows, common, new = dict[str, Int32](), dict[str, tuple[Int32, Int32]](), dict[str, Int32]()
    for name in (EMBEDDING, OUTPUT):
        if name in model.specs():
            spec = model.specs()[name]
            theirs = donor.specs().get(name) or donor.specs()[EMBEDDING]
            ids = np.arange(found.size, dtype=np.int32)
            is_kept, is_there = (found >= 0) & (found < spec.n_rows), ids < theirs.n_rows
            is_new = is_there & ~is_kept
            both = np.flatnonzero(is_kept & is_there)
            _check_common(model, donor, len(both), int(is_new.sum()), k)
            rows[name] = np.where(is_kept, found, np.int32(NO_ROW)).astype(np.int32)
            rows[name][is_new] = ~np.arange(is_new.sum(), dtype=np.int32)
            common[name] = ids[both], found[both]
            new[name] = ids[is_new]
    return _Work(model, donor, k, tokenizer, rows, common, new)


def _check_source(source: Source) -> None:
    kind = get_value(source.metadata(), MODEL_KEY)
    if TOKENS_KEY not in source.metadata() or kind not in UNITABLE:
        said = "it tells no tokens" if kind is None else f"its kind is {kind}"
        raise MismatchError(
            f"the tokenizer of {source.path} is none whose tokens can be compared ({said}); "
            f"give models with a vocabulary of {', '.join(UNITABLE.values())}"
        )
    if EMBEDDING not in source.specs():
        raise MismatchError(
            f"{source.path} has no tensor {EMBEDDING!r}; give a whole language model",
            tensor=EMBEDDING,
        )
    for name in (EMBEDDING, OUTPUT):
        if name in source.specs():
            find_codec(source.specs()[name])


def _check_common(model: Source, donor: Source, n_common: int, n_new: int, k: int) -> None:
    if not n_common:
        raise MismatchError(
            f"{model.path} and {donor.path} have no token in common, so that no row can be found; "
            "give a donor whose vocabulary has some of the model's tokens"
        )
    if n_new and k > n_common:
        raise MismatchError(
            f"{model.path} and {donor.path} have only {n_common} tokens in common, of which no {k} can "
            f"be combined; give --k {n_common} or less"
        )


# -- new rows --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Limits:
    floor: int
    budget: int
    threads: int


@dataclass(frozen=True, slots=True)
class _RowFile:
    """New rows, in a file without a name beside the output."""

    fd: int
    output: Path

    def write(self, raw_u8: UInt8, offset: int) -> None:
        """Write a row; raises OutputError where the disk is full, or cannot be written."""
        try:
            write_all(self.fd, raw_u8, offset)
        except OSError as error:
            raise OutputError(
                f"the disk cannot keep the new rows until all are found ({error.strerror}); free some "
                "space, or choose another",
                path=self.output,
            ) from error


def _make_rows(
    work: _Work, limits: _Limits, file: _RowFile, begin_part: BeginPart
) -> dict[str, int]:
    """Write the new rows of all tensors of tokens; return where those of each begin."""
    starts, at = dict[str, int](), 0
    for name in work.rows:
        starts[name] = at
        at += stored_spec(work.model.specs()[name], len(work.new[name])).nbytes
    groups = {name: made for name, made in work.by_donor().items() if len(work.new[made[0]])}
    if not groups:
        return starts
    _check_inputs(work, groups, begin_part)
    compile_missing(_kernels(work))
    total = sum(len(work.common[m[0]][0]) * len(work.new[m[0]]) * work.k for m in groups.values())
    show, done = begin_part("finding rows of new tokens", "comparisons"), 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        show(done, total)

    for donor_name, names in groups.items():
        spec, ids = work.donor.specs()[donor_name], work.common[names[0]][0]
        room, holds, threads = _divide(work, limits, spec, len(ids))
        rows = Rows(work.donor, spec, ids)
        if holds:
            rows = rows.hold()
        targets = Rows(work.donor, spec, work.new[names[0]])
        pool = ThreadPoolExecutor(threads)
        try:
            for start in range(0, len(targets.ids), room):
                stop = min(len(targets.ids), start + room)
                vectors = targets.read(np.arange(start, stop, dtype=np.int32))
                places, parts = pursue(rows, vectors, work.k, pool, step)
                for name in names:
                    _combine(work, name, places, parts, file, starts[name], start)
        finally:
            pool.shutdown(cancel_futures=True)
        work.donor.forget(donor_name)
    return starts


def _check_inputs(work: _Work, donor_names: Iterable[str], begin_part: BeginPart) -> None:
    """Refuse NaN and infinity now: the merge would find them in other tensors after the long work."""
    theirs = [(work.donor, name) for name in donor_names]
    ours = [(work.model, name) for name in work.model.specs()]
    check_finite([*theirs, *ours], begin_part("checking the inputs"))


def _combine(
    work: _Work,
    name: str,
    places: Int32,
    parts: NDArray[np.float64],
    file: _RowFile,
    first: int,
    start: int,
) -> None:
    """Write the same combinations of the model's rows, encoded."""
    spec = work.model.specs()[name]
    made = stored_spec(spec, len(work.new[name]))
    rows = Rows(work.model, spec, work.common[name][1])
    scratch = np.empty(CODECS[made.dtype].scratch_len, np.float32)
    raw = np.empty(made.row_bytes, np.uint8)
    for i, (where, much) in enumerate(zip(places, parts, strict=True)):
        taken = where >= 0
        found: Float32 = (
            (much[taken, None] * rows.read(where[taken])).sum(axis=0).astype(np.float32)
        )
        if made.dtype == "F16" and np.abs(found).max(initial=0) > LARGEST_F16:
            raise MismatchError(
                f"a new row of {name!r} is too large for F16; give a smaller --k, or the model as BF16",
                tensor=name,
            )
        CODECS[made.dtype].encode(found, raw, scratch)
        file.write(raw, first + (start + i) * made.row_bytes)


def _divide(work: _Work, limits: _Limits, spec: TensorSpec, n_common: int) -> tuple[int, bool, int]:
    """Return how many vectors are worked on at a time, whether common rows are held, and the threads.

    Raises
    ------
    BudgetError
        The budget does not hold one vector.
    """
    headers = header_bytes((work.model, work.donor))
    widest = max(work.model.specs()[name].n_cols for name in work.rows)
    reading = max(work.model.work_bytes(), work.donor.work_bytes())
    fixed = limits.floor + 2 * headers + SPARE + 24 * widest * work.k
    each = target_bytes(spec.n_cols, work.k)
    beside = partial(block_bytes, spec.n_cols, work.k)
    needed = fixed + reading + beside(1) + each
    if needed > limits.budget:
        needed = -(-needed // MIB) * MIB
        raise BudgetError(
            f"a budget of {format_size(limits.budget)} is too small for k = {work.k}; the smallest that "
            f"works is --memory {needed // MIB}MiB, and a smaller --k takes less",
            needed=needed,
            budget=limits.budget,
        )
    threads = limits.threads
    while threads > 1 and fixed + threads * reading + beside(threads) + each > limits.budget:
        threads -= 1
    room = limits.budget - fixed - threads * reading - beside(threads)
    # For each vector, what a thread's answer has of it.
    each += 16 * threads
    whole = 2 * 4 * n_common * spec.n_cols  # held, and once more while it is read
    holds = whole <= room // 2
    return max(1, (room - whole * holds) // each), holds, threads


def _kernels(work: _Work) -> set[str]:
    """Name what decodes and encodes the rows, and multiplies them."""
    names = {"lora.add_product"}
    for source in (work.model, work.donor):
        for name in (EMBEDDING, OUTPUT):
            spec = source.specs().get(name)
            if spec is not None and (file := CODECS[spec.dtype].kernels):
                names.add(f"{file}.decode_{spec.dtype.lower()}")
    for name in work.rows:
        dtype = stored_spec(work.model.specs()[name], 1).dtype
        if file := CODECS[dtype].kernels:
            names.add(f"{file}.encode_{dtype.lower()}")
    return names
