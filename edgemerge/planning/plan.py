"""From a recipe and open models to a `Plan`: every decision, before any tensor data is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from edgemerge.budget import (
    FLOOR_BYTES,
    SOLVER_BYTES,
    ArenaNeed,
    aligned,
    blocks_in_arena,
    divide_budget,
    rows_in_arena,
    workers_on,
)
from edgemerge.errors import MismatchError, RecipeError
from edgemerge.formats.architectures import layer_index
from edgemerge.formats.quants.codec import CODECS, find_codec, row_bytes
from edgemerge.formats.quants.imatrix import ImportanceMatrix
from edgemerge.formats.quants.weighted import WEIGHTED_SCRATCH
from edgemerge.methods.blocks import ELECTION_TILE, N_HIGH, N_LOW, RANK_BINS, SUM_LANES
from edgemerge.methods.table import Method, count_passes, find_method, is_pruned
from edgemerge.planning.compatibility import check_models, check_scaled_output
from edgemerge.planning.header import choose_types, output_metadata
from edgemerge.planning.importance import importance_metadata, weigh_jobs
from edgemerge.planning.jobs import Draft, draft_jobs, list_experts, may_copy, unused_settings
from edgemerge.planning.vocabulary import find_vocabulary, note_templates
from edgemerge.types import Plan, Recipe, Source, TensorJob, TensorSpec

__all__ = ["DEFAULT_MEMORY", "alignment_pairs", "make_plan"]

DEFAULT_MEMORY = 512 << 20
COUNTER_BYTES = 4 * (N_HIGH + 2 * N_LOW)  # of the radix select, per expert
COMPARED = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output")
TINY_WEIGHT = 1e-8
MAX_ELEMENTS = 1 << 32  # of one tensor: the radix select counts in 32 bits
ARRAYS = 8  # what alignment may add to one arena, in arrays


def make_plan(
    recipe: Recipe,
    open_model: Callable[[Path], Source],
    *,
    memory: int | None = None,
    threads: int = 1,
) -> Plan:
    """Decide a merge.

    Parameters
    ----------
    recipe : Recipe
        What is wanted.
    open_model : callable
        Path -> open `Source`; called once per model.
    memory : int, optional
        Budget in bytes for the whole process; else the recipe's, else 512 MiB.
    threads : int
        Workers at most.

    Raises
    ------
    RecipeError, FormatError, MismatchError, BudgetError
        See `edgemerge.errors`; nothing has been written.
    """
    method = find_method(recipe.method)
    _check_counts(recipe, method)
    models = recipe.models()
    sources = {path: open_model(path) for path in models}
    notes = [*recipe.notes, *unused_settings(recipe, method)]
    owner = find_vocabulary(recipe, sources)
    notes += check_models(list(sources.values()), owner)
    if recipe.chat_template is None:
        notes += note_templates(owner, list(sources.values()))
    drafts = list(draft_jobs(recipe, method, models, sources))
    _check_settings(method, drafts)
    file_type, types = choose_types(recipe, method, drafts, sources, notes)
    check_scaled_output(types, sources[models[0]])
    metadata = output_metadata(recipe, method, sources, drafts, file_type, types)
    jobs = [_finish(draft, method, types[draft.name]) for draft in drafts]
    if recipe.imatrix is not None:
        with closing(ImportanceMatrix(recipe.imatrix)) as importance:
            jobs, lacking = weigh_jobs(jobs, importance)
            notes += lacking
            metadata |= importance_metadata(importance)
    align = recipe.align or method.align
    needs = [_arena_need(job, align, moves=align != "off" or recipe.neurons) for job in jobs]
    budget = memory or recipe.memory or DEFAULT_MEMORY
    header_bytes = sum(len(v) for source in sources.values() for v in source.metadata().values())
    reserved, alignment = _alignment_needs(align, jobs, list(sources.values()))
    if recipe.neurons:
        _refuse_slices(recipe)
        reserved = SOLVER_BYTES
    workers, arena_bytes = divide_budget(
        needs + alignment, budget, threads, 2 * header_bytes + reserved
    )
    total = sum(job.out.n_elements for job in jobs)
    return Plan(
        recipe=recipe,
        models=models,
        jobs=tuple(
            _with_rows(job, need, arena_bytes, workers_on(job.out.n_elements, total, workers))
            for job, need in zip(jobs, needs, strict=True)
        ),
        metadata=metadata,
        file_type=file_type,
        budget=budget,
        workers=workers,
        arena_bytes=arena_bytes,
        align=align if alignment else "off",
        alignment_bytes=_alignment_bytes(jobs, list(sources.values())) if alignment else 0,
        neuron_bytes=budget - FLOOR_BYTES - 2 * header_bytes - reserved,
        notes=tuple(dict.fromkeys(notes)),
    )


def _check_counts(recipe: Recipe, method: Method) -> None:
    if method.needs_base and recipe.base is None:
        raise RecipeError(
            f"{method.name} needs the base that the models were tuned from; give it with --base "
            "or base_model",
            field="base_model",
        )
    least, most = method.n_models
    for part in recipe.slices:
        count = len(list_experts(part, recipe.base, method))
        if count < least or (most is not None and count > most):
            wanted = f"{least}" if most == least else f"at least {least}"
            beside = " besides the base" if method.needs_base else ""
            raise RecipeError(
                f"{method.name} takes {wanted} model{'s' * (least != 1)}{beside}, not {count}",
                field="models",
            )


def _refuse_slices(recipe: Recipe) -> None:
    if any(model.layer_range for part in recipe.slices for model in part.inputs):
        raise RecipeError("neurons are matched in whole models, not in slices", field="neurons")


def _check_settings(method: Method, drafts: Sequence[Draft]) -> None:
    """Refuse settings that no tensor can be merged with."""
    for draft in drafts:
        if draft.is_constant:
            continue
        total = sum(float(expert.settings.get("weight", 1.0)) for expert in draft.experts)
        weighted = draft.settings.get("weighting") not in (None, "paper")
        if (weighted or draft.settings.get("normalize")) and (
            method.name in ("linear", "hierarchical") and abs(total) < TINY_WEIGHT
        ):
            raise RecipeError(
                f"the weights of {draft.name} sum to zero, which cannot be normalised; "
                + ("change them" if weighted else "change them or set normalize: false"),
                field="weight",
            )
        if draft.settings.get("weighting") == "paper" and len(draft.experts) != 2:
            raise RecipeError(
                f"the paper's weighting is defined for two models, not {len(draft.experts)}; "
                "use weighting: agreement",
                field="weighting",
            )


# -- jobs and memory ------------------------------------------------------------------------------


def _finish(draft: Draft, method: Method, dtype: str) -> TensorJob:
    shape = draft.reference.shape
    spec = TensorSpec(draft.name, shape, dtype, 0)
    spec = replace(spec, nbytes=spec.n_rows * row_bytes(dtype, spec.n_cols))
    copies = may_copy(draft, method)
    passes = 1
    if not copies:
        passes = count_passes(method, [e.settings for e in draft.experts], draft.settings)
    job = TensorJob(
        out=spec,
        method="passthrough" if copies else method.name,
        base=draft.base,
        experts=(replace(draft.experts[0], settings={"scale": 1.0}),) if copies else draft.experts,
        settings=draft.settings,
        rows_per_block=0,
        passes=passes,
        filler=draft.filler,
    )
    if spec.n_elements >= MAX_ELEMENTS or 0 in shape:
        raise MismatchError(
            f"tensor {spec.name!r} has the shape {list(shape)}, which cannot be merged",
            tensor=spec.name,
        )
    if not job.is_byte_copy:
        for tensor in job.inputs:
            find_codec(tensor.spec)
    return job


def _alignment_needs(
    align: str, jobs: Sequence[TensorJob], sources: Sequence[Source]
) -> tuple[int, list[ArenaNeed]]:
    """Say what aligning heads adds: libraries for the whole process, and an arena per worker."""
    if align == "off":
        return 0, []
    from edgemerge.alignment.heads import arena_need  # imports Numba

    needs = [
        ArenaNeed(1, 1, arena_need(sources[left], sources[right], layers)[0], 0, 0, surveyed=False)
        for (left, right), layers in alignment_pairs(jobs).items()
    ]
    return (SOLVER_BYTES if needs else 0), needs


def _alignment_bytes(jobs: Sequence[TensorJob], sources: Sequence[Source]) -> int:
    """Add up the attention tensors that are read to compare heads."""
    total = 0
    for models, layers in alignment_pairs(jobs).items():
        for pair in layers:
            for model, layer in zip(models, pair, strict=True):
                stems = tuple(f"blk.{layer}.{stem}." for stem in COMPARED)
                specs = sources[model].specs().values()
                total += sum(spec.nbytes for spec in specs if spec.name.startswith(stems))
    return total


def alignment_pairs(jobs: Sequence[TensorJob]) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """List what meets in a merge: (reference model, other model) -> pairs of their layers.

    The reference is the base, or without one the first model.
    """
    pairs: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for job in jobs:
        reference, *others = job.inputs
        left = layer_index(reference.spec.name)
        for other in others:
            right = layer_index(other.spec.name)
            if left is not None and right is not None:
                pairs.setdefault((reference.model, other.model), set()).add((left, right))
    return {models: sorted(layers) for models, layers in pairs.items()}


def _arena_need(job: TensorJob, align: str, *, moves: bool) -> ArenaNeed:
    """Add up what `stream` and `arithmetic` will take from the arena for one tensor."""
    n_cols = job.out.n_cols
    widest = max(tensor.spec.row_bytes for tensor in (*job.inputs,))
    if job.is_byte_copy:
        return ArenaNeed(job.out.n_rows, n_cols, aligned(1) * ARRAYS, widest, 0, surveyed=False)
    method = find_method(job.method)
    pruned = any(is_pruned(method, expert.settings) for expert in job.experts)
    fixed = aligned(1) * ARRAYS * (1 + len(job.experts)) + 8 * SUM_LANES
    if job.is_weighted:
        fixed += 4 * (WEIGHTED_SCRATCH + n_cols)
    else:
        fixed += 4 * CODECS[job.out.dtype].scratch_len
    if method.elect:
        fixed += 4 * 3 * ELECTION_TILE
    if pruned and method.prune in ("magnitude", "band"):
        fixed += COUNTER_BYTES * len(job.experts)
    if pruned and method.prune == "rank":
        fixed += 4 * (5 * n_cols + RANK_BINS + 1)
    if method.name == "hierarchical":
        fixed += 8 * len(job.experts) ** 2
    if moves:
        fixed += 4 * n_cols
    per_row = max(widest, job.out.row_bytes)
    per_row += 8 * len(job.experts) ** 2 if method.name == "hierarchical" else 0
    per_row += 16 if pruned else 0  # norms of a row
    per_row += 24 if method.name == "slerp" else 0
    per_row += 4 * n_cols if align == "soft" else 0
    inputs = 4 * n_cols * len(job.inputs)
    surveyed = job.passes > 1 and not job.is_layer_scoped  # else all of a layer comes in between
    return ArenaNeed(job.out.n_rows, n_cols, fixed, per_row, inputs, surveyed=surveyed)


def _with_rows(job: TensorJob, need: ArenaNeed, arena_bytes: int, workers: int) -> TensorJob:
    rows = rows_in_arena(need, arena_bytes)
    held = blocks_in_arena(need, rows, arena_bytes)
    # A tensor that is held whole is read once, however often it is surveyed.
    passes = 1 if workers == 1 and held * rows >= need.n_rows else job.passes
    return replace(job, rows_per_block=rows, passes=passes, workers=workers, held_blocks=held)
