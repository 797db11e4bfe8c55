"""What a user should know before the work: models that change nothing, weights that subtract, other bases."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from edgemerge.formats.quants.codec import CODECS
from edgemerge.merging.verdicts import FAR, LOUD, say_far, say_loud
from edgemerge.planning.decompositions import say_costly_ranks
from edgemerge.types import Float64, InputTensor, Plan, Source, TensorJob

__all__ = ["foresee_warnings", "warn_of_recipe"]

COMPARED = 8  # tensors whose first row is compared
SAMPLED = 4  # rows in the middle of a tensor whose directions and norms are compared
REORDERED = (".attn_", ".ffn_")  # in the names of tensors that an alignment changes


def foresee_warnings(the_plan: Plan, sources: Sequence[Source]) -> Iterator[str]:
    """Yield sentences about a merge that is probably not what was meant.

    Parameters
    ----------
    the_plan : Plan
        What will be done.
    sources : sequence of Source
        The open models, as `the_plan.models` lists them. A row of a few tensors is read.
    """
    yield from warn_of_recipe(the_plan)
    yield from _equal_experts(the_plan, sources)
    yield from _far_or_loud(the_plan, sources)


def warn_of_recipe(the_plan: Plan) -> Iterator[str]:
    """Yield those of `foresee_warnings` for which no model is read."""
    recipe = the_plan.recipe
    for part in recipe.slices:
        for path, count in Counter((one.path, one.layer_range) for one in part.inputs).items():
            if count > 1:
                yield f"{path[0].name} is given {count} times, and counts as often"
    if recipe.method == "linear" and len(the_plan.models) == 1:
        yield "linear of one model is that model"
    factors = {float(job.settings.get("lambda", 1.0)) for job in the_plan.jobs}
    if min(factors, default=1.0) < 0:
        yield f"lambda is {min(factors):g}: what the experts have learnt is subtracted"
    yield from say_costly_ranks(the_plan)


def _equal_experts(the_plan: Plan, sources: Sequence[Source]) -> Iterator[str]:
    """Compare the first row of a few tensors of every expert with the base's, as stored."""
    jobs = [job for job in the_plan.jobs if job.base is not None and len(job.out.shape) > 1]
    compared: dict[int, list[bool]] = {}
    for job in jobs[:: max(1, len(jobs) // COMPARED)]:
        for model, is_equal in _compare(job, sources):
            compared.setdefault(model, []).append(is_equal)
    for model, results in compared.items():
        if all(results):
            yield (
                f"{the_plan.models[model].name} has the base's weights wherever they were compared: "
                "it changes nothing"
            )


def _compare(job: TensorJob, sources: Sequence[Source]) -> Iterator[tuple[int, bool]]:
    base = job.base
    assert base is not None
    for expert in job.experts:
        is_alike = job.rows is not None or expert.spec.shape == base.spec.shape
        if expert.spec.dtype != base.spec.dtype or not is_alike:
            yield expert.model, False
            continue
        first, second = (np.empty(t.spec.row_bytes, np.uint8) for t in (base, expert))
        sources[base.model].read_rows(base.spec.name, 0, 1, first)
        sources[expert.model].read_rows(expert.spec.name, 0, 1, second)
        yield expert.model, bool(np.array_equal(first, second))


def _far_or_loud(the_plan: Plan, sources: Sequence[Source]) -> Iterator[str]:
    """Compare some rows of a few tensors: an expert from another base, or far louder than the rest."""
    jobs = [job for job in the_plan.jobs if _is_comparable(job, the_plan)]
    cosines: dict[tuple[int, int], list[float]] = {}  # by expert and what it is compared with
    changes: dict[int, list[float]] = {}  # squares, without a base of the weights; no zeros
    weighted: dict[int, list[float]] = {}  # the same by the expert's weight
    for job in jobs[:: max(1, len(jobs) // COMPARED)]:
        reference = job.base or job.experts[0]
        root = _sample(reference, sources)
        sampled = [(expert, _sample(expert, sources)) for expert in job.experts]
        if not all(np.isfinite(rows).all() for rows in (root, *(rows for _, rows in sampled))):
            continue  # the merge will say where
        for expert, rows in sampled:
            if expert.model != reference.model:
                found = cosines.setdefault((expert.model, reference.model), [])
                found.append(_cosine(rows, root))
            squares = _dot(rows, rows) if job.base is None else _dot(rows - root, rows - root)
            if squares:
                weight = float(expert.settings.get("weight", 1.0))
                changes.setdefault(expert.model, []).append(squares)
                weighted.setdefault(expert.model, []).append(weight**2 * squares)
    names = [model.name for model in the_plan.models]
    for (model, other), of_model in cosines.items():
        if (cosine := math.fsum(of_model) / len(of_model)) < FAR:
            yield say_far(names[model], names[other], cosine)
    norms, used = ({m: math.sqrt(np.mean(x)) for m, x in d.items()} for d in (changes, weighted))
    if not norms:
        return
    loud, quiet = max(norms, key=norms.__getitem__), min(norms, key=norms.__getitem__)
    # Weights that make up for it are an answer already.
    if norms[loud] >= LOUD * norms[quiet] and used[loud] >= LOUD * used[quiet] > 0:
        what = "change of the base" if jobs[0].base is not None else "weights"
        yield say_loud(names[loud], names[quiet], norms[loud] / norms[quiet], what)


def _is_comparable(job: TensorJob, the_plan: Plan) -> bool:
    """Tell whether the rows of all inputs belong together, as they are stored."""
    specs = [tensor.spec for tensor in job.inputs]
    return (
        len(specs) > 1
        and len(job.out.shape) > 1
        and job.rows is None
        and len({(spec.name, spec.shape) for spec in specs}) == 1
        and not (the_plan.reorders and any(part in job.name for part in REORDERED))
    )


def _sample(tensor: InputTensor, sources: Sequence[Source]) -> Float64:
    """Read some rows from the middle of a tensor, (n_rows * n_cols,) float64."""
    spec = tensor.spec
    start = max(0, spec.n_rows - SAMPLED) // 2
    n_rows = min(SAMPLED, spec.n_rows)
    raw = np.empty(n_rows * spec.row_bytes, np.uint8)
    sources[tensor.model].read_rows(spec.name, start, start + n_rows, raw)
    values = np.empty(n_rows * spec.n_cols, np.float32)
    CODECS[spec.dtype].decode(raw, values)
    return values.astype(np.float64)


def _cosine(a: Float64, b: Float64) -> float:
    length = math.sqrt(_dot(a, a) * _dot(b, b))
    return _dot(a, b) / length if length else 1.0


def _dot(a: Float64, b: Float64) -> float:
    return float(np.sum(a * b))
