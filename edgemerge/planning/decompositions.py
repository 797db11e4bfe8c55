"""What singular directions of a plan's matrices cost: little by default, days with a rank of thousands."""

from __future__ import annotations

from collections.abc import Iterator

from edgemerge.methods.calibration import calibration_sides, is_calibrated
from edgemerge.methods.directions import has_directions
from edgemerge.methods.table import find_method
from edgemerge.planning.reference import DECOMPOSE
from edgemerge.sizes import format_duration
from edgemerge.types import Plan, TensorJob

__all__ = ["decomposing_seconds", "say_costly_ranks"]

COSTLY = 10.0  # seconds of the reference machine's core from which a plan speaks of them
RANKS = ("rank", "svc_rank")


def decomposing_seconds(job: TensorJob) -> float:
    """Return the seconds that one core of the reference machine takes for a tensor's decompositions."""
    return 1e-9 * DECOMPOSE * sum(side**3 for side in _sides(job))


def say_costly_ranks(the_plan: Plan) -> Iterator[str]:
    """Yield sentences about ranks above those of all matrices, and about what decompositions cost."""
    matrices = [job for job in the_plan.jobs if not job.is_copy and has_directions(job)]
    most = max((min(job.out.n_rows, job.out.n_cols) for job in matrices), default=0)
    named = []
    for name in RANKS:
        asked = [rank for job in matrices if (rank := _asked(job, name)) is not None]
        if asked:
            named.append(name)
        if asked and min(asked) > most:
            yield f"{name} {min(asked):.15g} counts as {most}: no matrix has more directions"
    seconds = sum(map(decomposing_seconds, matrices))
    if seconds >= COSTLY:
        side = max(side for job in matrices for side in _sides(job))
        yield (
            f"the singular directions of all matrices, up to {side} at once, take about "
            f"{format_duration(seconds)} of a core of the reference machine, which grows with the cube of "
            f"{' and '.join(named)}"
        )


def _asked(job: TensorJob, name: str) -> float | None:
    """Return a rank that has an effect on a tensor."""
    if name not in job.settings or (name == "svc_rank" and not is_calibrated(job)):
        return None
    return float(job.settings[name])


def _sides(job: TensorJob) -> list[int]:
    return [*find_method(job.method).decomposes(job), *calibration_sides(job)]
