"""What the tensors of a plan ask of a process's memory, and how the plan fits another process's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgemerge.budget import (
    ArenaNeed,
    aligned,
    blocks_in_arena,
    divide_budget,
    floor_bytes,
    rows_in_arena,
)
from edgemerge.formats.adapters.adapted import held_bytes, reading_bytes, without_adapters
from edgemerge.formats.mixture import MixtureSource
from edgemerge.formats.quants.codec import CODECS
from edgemerge.formats.quants.weighted import WEIGHTED_SCRATCH
from edgemerge.methods.blocks import SUM_LANES
from edgemerge.methods.table import find_method
from edgemerge.planning.token_maps import memory_of_rows
from edgemerge.types import SUMS, Plan, Source, TensorJob

__all__ = ["cut_blocks", "find_need", "fit_plan", "header_bytes"]

ARRAYS = 8  # what alignment may add to one arena, in arrays


def header_bytes(sources: Sequence[Source]) -> int:
    """Add up what models' metadata takes while they are open: a base that adapters are added to, once."""
    distinct = {id(base): base for base in map(without_adapters, sources)}
    return sum(map(_header_bytes, distinct.values())) + held_bytes(sources)


def _header_bytes(source: Source) -> int:
    if isinstance(source, MixtureSource):
        return source.held_bytes()
    return sum(len(value) for value in source.metadata().values())


def find_need(job: TensorJob, align: str, *, aligns: bool) -> ArenaNeed:
    """Add up what `TensorStream` and the method will take from the arena for one tensor."""
    n_cols = job.out.n_cols
    widest = max(tensor.spec.row_bytes for tensor in (*job.inputs,))
    if job.is_byte_copy:
        return ArenaNeed(job.out.n_rows, n_cols, aligned(1) * ARRAYS, widest, 0, surveyed=False)
    method = find_method(job.method)
    own = method.memory(job)
    fixed = own.fixed + aligned(1) * ARRAYS * (1 + len(job.experts)) + 8 * SUM_LANES
    if job.is_weighted:
        fixed += 4 * (WEIGHTED_SCRATCH + n_cols)
    else:
        fixed += 4 * CODECS[job.out.dtype].scratch_len
    if aligns:
        fixed += 4 * n_cols
    fixed_of_tokens, per_row_of_tokens = memory_of_rows(job)
    fixed += fixed_of_tokens
    per_row = own.per_row + per_row_of_tokens + max(widest, job.out.row_bytes)
    per_row += 4 * n_cols if align in SUMS else 0
    inputs = 4 * n_cols * len(job.inputs)
    # Other tensors of the layer are measured between this one's measurement and its merge.
    surveyed = job.passes > 1 and not method.spans_layer(job)
    return ArenaNeed(job.out.n_rows, n_cols, fixed, per_row, inputs, surveyed=surveyed)


def cut_blocks(job: TensorJob, need: ArenaNeed, arena_bytes: int, workers: int) -> TensorJob:
    """Choose the height of a tensor's blocks, and how many stay in an arena; `workers`: on the tensor."""
    rows = rows_in_arena(need, arena_bytes)
    cached = blocks_in_arena(need, rows, arena_bytes)
    # A tensor that is cached whole is read once, whatever the number of passes over its blocks.
    passes = 1 if workers == 1 and cached * rows >= need.n_rows else job.passes
    return replace(job, rows_per_block=rows, passes=passes, workers=workers, cached_blocks=cached)


def fit_plan(
    the_plan: Plan, sources: Sequence[Source], *, memory: int, threads: int, beside: int
) -> Plan:
    """Cut a plan's tensors into blocks that fit this process, which did not make it.

    Heads and neurons are aligned already. One worker makes each tensor.

    Parameters
    ----------
    the_plan : Plan
        Made for a process with another budget; of `jobs`, nothing that decides bytes is changed.
    sources : sequence of Source
        Its models, open in this process.
    memory : int
        Budget in bytes for the whole process.
    threads : int
        Tensors that are made at a time, at most.
    beside : int
        Bytes for what is neither models nor arenas.

    Raises
    ------
    BudgetError
        The budget is too small.
    """
    jobs = [
        replace(job, passes=_passes(job), rows_per_block=0, cached_blocks=0)
        for job in the_plan.jobs
    ]
    needs = [find_need(job, the_plan.align, aligns=the_plan.reorders) for job in jobs]
    maps = sum({id(job.rows): job.rows.n_bytes for job in jobs if job.rows}.values())
    workers, arena_bytes = divide_budget(
        needs,
        memory,
        threads,
        2 * header_bytes(sources) + maps + beside,
        reading=reading_bytes(sources),
        floor=floor_bytes(),
    )
    cut = [cut_blocks(job, need, arena_bytes, 1) for job, need in zip(jobs, needs, strict=True)]
    return replace(
        the_plan, jobs=tuple(cut), budget=memory, workers=workers, arena_bytes=arena_bytes
    )


def _passes(job: TensorJob) -> int:
    """Return how often the inputs of a tensor are read where no block stays in memory."""
    return 1 if job.is_copy else find_method(job.method).passes(job)
