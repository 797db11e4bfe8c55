"""From a recipe and open models to a `Plan`: every decision, before any tensor data is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgemerge.budget import (
    FLOOR_BYTES,
    SOLVER_BYTES,
    WORKER_BYTES,
    ArenaNeed,
    divide_budget,
    workers_on,
)
from edgemerge.errors import MismatchError, RecipeError
from edgemerge.formats.adapters.adapted import reading_bytes
from edgemerge.formats.architectures import layer_index
from edgemerge.formats.quants.codec import find_codec, row_bytes
from edgemerge.formats.quants.imatrix import ImportanceMatrix
from edgemerge.methods.linear import PASSTHROUGH
from edgemerge.methods.method import Method
from edgemerge.methods.table import find_method
from edgemerge.planning.compatibility import check_models, check_scaled_output
from edgemerge.planning.header import choose_types, output_metadata
from edgemerge.planning.importance import find_measured, importance_metadata, weigh_jobs
from edgemerge.planning.jobs import (
    Draft,
    draft_jobs,
    find_depths,
    list_experts,
    may_copy,
)
from edgemerge.planning.layer_order import check_layer_order
from edgemerge.planning.llama_check import check_runs
from edgemerge.planning.memory import cut_blocks, find_need, header_bytes
from edgemerge.planning.settings import idle_filters, unused_settings
from edgemerge.planning.template_check import check_template
from edgemerge.planning.token_maps import describe_rows
from edgemerge.planning.vocabulary import choose_vocabulary, names_outsider, note_templates
from edgemerge.types import Plan, Recipe, Source, TensorJob, TensorSpec

if TYPE_CHECKING:
    from edgemerge.planning.folder import Folder

__all__ = ["DEFAULT_MEMORY", "alignment_pairs", "make_plan"]

DEFAULT_MEMORY = 512 << 20
COMPARED = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output")
UNSCALED = PASSTHROUGH.defaults(model=True)
MAX_ELEMENTS = 1 << 32  # of one tensor: the radix select counts in 32 bits


def make_plan(
    recipe: Recipe,
    open_model: Callable[[Path], Source],
    *,
    memory: int | None = None,
    threads: int = 1,
    floor: int = FLOOR_BYTES,
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
    floor : int
        What of the budget the process takes beside this merge, from `edgemerge.budget.floor_bytes`.

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
    notes += idle_filters(recipe, sources.values())
    outside = names_outsider(recipe)
    vocabulary = choose_vocabulary(recipe, sources, open_model(outside) if outside else None)
    owner = vocabulary.owner
    notes += check_models(list(sources.values()), owner, by_text=vocabulary.by_text)
    notes += vocabulary.notes
    if recipe.chat_template is None:
        notes += note_templates(owner, list(sources.values()))
    drafts = list(draft_jobs(recipe, method, models, sources, vocabulary))
    notes += check_layer_order(drafts, list(sources.values()), stacked=len(recipe.slices) > 1)
    if vocabulary.by_text:
        notes += _describe_tokens(drafts, models)
    for draft in drafts:
        if not draft.is_constant:
            method.check(draft)
    drafts, lacking, checksums = find_measured(drafts, recipe, method, models)
    notes += lacking
    folder = _find_folder(recipe, sources[models[0]], owner)
    if folder is not None:
        drafts = [draft for draft in drafts if folder.holds(draft.name)]
        file_type, types = folder.choose_types(drafts)
    else:
        file_type, types = choose_types(recipe, method, drafts, sources, notes)
        check_scaled_output(types, sources[models[0]])
    metadata = output_metadata(recipe, method, sources, vocabulary, drafts, file_type, types, notes)
    metadata |= checksums
    notes += check_template(metadata, [owner, *sources.values()])
    depths = find_depths([draft.name for draft in drafts])
    jobs = [
        replace(_finish(draft, method, types[draft.name], folder), depth=depths[draft.name])
        for draft in drafts
    ]
    folder_bytes = 0
    if folder is not None:
        described = folder.describe([job.out for job in jobs], metadata, file_type)
        folder_bytes = sum(len(raw) for raw in described.files.values())
        notes += described.notes
    else:
        notes += check_runs(metadata, jobs, sources[models[0]])
    if recipe.imatrix is not None:
        with closing(ImportanceMatrix(recipe.imatrix)) as importance:
            jobs, lacking = weigh_jobs(jobs, importance)
            notes += lacking
            metadata |= importance_metadata(importance)
    align = recipe.align or method.align
    needs = [find_need(job, align, aligns=align != "off" or recipe.matches_neurons) for job in jobs]
    budget = memory or recipe.memory or DEFAULT_MEMORY
    read = [*sources.values(), *([] if owner in sources.values() else [owner])]
    of_headers = header_bytes(read)
    of_headers += sum({id(d.rows): d.rows.n_bytes for d in drafts if d.rows}.values())
    reserved, alignment = _alignment_needs(align, jobs, list(sources.values()))
    reading, neuron_bytes = reading_bytes(list(sources.values())), 0
    if recipe.matches_neurons:
        _refuse_slices(recipe)
        reserved = max(reserved, SOLVER_BYTES)
        neuron_bytes = reading + _neuron_bytes(jobs, list(sources.values()))
    beside = 2 * of_headers + reserved + folder_bytes
    workers, arena_bytes = divide_budget(
        needs + alignment,
        budget,
        threads,
        beside,
        before_arenas=neuron_bytes,
        reading=reading,
        floor=floor,
    )
    total = sum(job.out.n_elements for job in jobs)
    return Plan(
        recipe=recipe,
        models=models,
        jobs=tuple(
            cut_blocks(job, need, arena_bytes, workers_on(job.out.n_elements, total, workers))
            for job, need in zip(jobs, needs, strict=True)
        ),
        metadata=metadata,
        file_type=file_type,
        budget=budget,
        workers=workers,
        arena_bytes=arena_bytes,
        needed_bytes=floor
        + beside
        + max(neuron_bytes, workers * (arena_bytes + WORKER_BYTES + reading)),
        align=align if alignment else "off",
        alignment_bytes=_alignment_bytes(align, jobs, list(sources.values())) if alignment else 0,
        notes=tuple(dict.fromkeys(notes)),
    )


def _describe_tokens(drafts: Sequence[Draft], models: Sequence[Path]) -> Iterator[str]:
    """Say of the tensors of tokens where their rows come from; once, where they are alike."""
    for draft in drafts:
        if draft.rows is not None:
            inputs = draft.inputs
            names = [models[tensor.model].name for tensor in inputs]
            yield from describe_rows(draft.rows, names, [tensor.spec.n_rows for tensor in inputs])


def _check_counts(recipe: Recipe, method: Method) -> None:
    if method.needs_base and not all(recipe.base_of(part) for part in recipe.slices):
        raise RecipeError(
            f"{method.name} needs the base that the models were tuned from; give it with --base "
            "or base_model",
            field="base_model",
        )
    least, most = method.n_models
    for part in recipe.slices:
        count = len(list_experts(part, recipe.base_of(part), method))
        if count < least or (most is not None and count > most):
            wanted = f"{least}" if most == least else f"at least {least}"
            beside = " besides the base" if method.uses_base(recipe.base) else ""
            raise RecipeError(
                f"{method.name} takes {wanted} model{'s' * (least != 1)}{beside}, not {count}",
                field="models",
            )


def _refuse_slices(recipe: Recipe) -> None:
    if any(model.layer_range for part in recipe.slices for model in part.inputs):
        raise RecipeError("neurons are matched in whole models, not in slices", field="neurons")


def _find_folder(recipe: Recipe, base: Source, owner: Source) -> Folder | None:
    if recipe.out_format != "hf":
        return None
    from edgemerge.planning.folder import Folder  # only a directory pays for the import

    return Folder(recipe, base, owner)


# -- jobs and memory ------------------------------------------------------------------------------


def _finish(draft: Draft, method: Method, dtype: str, folder: Folder | None) -> TensorJob:
    shape = draft.reference.shape
    spec = TensorSpec(draft.name, shape, dtype, 0)
    spec = replace(spec, nbytes=spec.n_rows * row_bytes(dtype, spec.n_cols))
    copies = may_copy(draft, method)
    job = TensorJob(
        out=spec,
        method=PASSTHROUGH.name if copies else method.name,
        base=draft.base,
        experts=(replace(draft.experts[0], settings=UNSCALED),) if copies else draft.experts,
        settings=draft.settings,
        rows_per_block=0,
        passes=1 if copies else method.passes(draft),
        is_copy=copies,
        rows=draft.rows,
        change=None if folder is None else folder.change(draft.name),
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
    """Return what aligning heads takes: bytes of libraries and rotations, and the needs of an arena."""
    if align == "off":
        return 0, []
    from edgemerge.alignment.heads import arena_need, rotations_need  # only alignment pays for it

    needs, kept = [], 0
    for (left, right), layers in alignment_pairs(jobs).items():
        pair, rotates = (sources[left], sources[right]), align == "full"
        least, _ = arena_need(*pair, layers, rotates=rotates)
        needs.append(ArenaNeed(1, 1, least, 0, 0, surveyed=False))
        kept += rotations_need(*pair, layers)[0] if rotates else 0
    return (SOLVER_BYTES + kept if needs else 0), needs


def _neuron_bytes(jobs: Sequence[TensorJob], sources: Sequence[Source]) -> int:
    """Return the bytes that matching neurons takes, before the arenas are made."""
    from edgemerge.alignment.neurons import neuron_need  # only who matches them pays for the import

    pairs = alignment_pairs(jobs)
    return max((neuron_need(sources[left], sources[right]) for left, right in pairs), default=0)


def _alignment_bytes(align: str, jobs: Sequence[TensorJob], sources: Sequence[Source]) -> int:
    """Add up the attention tensors that are read to compare heads, and again to rotate values."""
    from edgemerge.alignment.heads import rotations_need

    total = 0
    for models, layers in alignment_pairs(jobs).items():
        if align == "full":
            total += rotations_need(sources[models[0]], sources[models[1]], layers)[1]
        for pair in layers:
            for model, layer in zip(models, pair, strict=True):
                stems = tuple(f"blk.{layer}.{stem}." for stem in COMPARED)
                specs = sources[model].specs().values()
                total += sum(spec.nbytes for spec in specs if spec.name.startswith(stems))
    return total


def alignment_pairs(jobs: Sequence[TensorJob]) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """List which layers are merged together: (reference model, other model) -> pairs of layers.

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
