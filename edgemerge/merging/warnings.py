"""What a user should know before the work: models that change nothing, weights that subtract."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from edgemerge.types import Plan, Source, TensorJob

__all__ = ["foresee_warnings", "warn_of_recipe"]

COMPARED = 8  # tensors whose first row is compared


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
