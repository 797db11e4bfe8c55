"""Which questions a trial is asked when, and which nobody is asked before the end.

Example: a file of 12 questions, a third of it held out. A seeded draw takes 4 for the end. The other 8 are
cut into rungs of 2, 2 and 4. A trial is stopped after 2 or 4 of them where half of the trials before it
were better.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgemerge.errors import FormatError
from edgemerge.runtime.evaluation.tasks import Task

__all__ = ["RUNGS", "Portions", "divide", "divide_task"]

RUNGS = (0.25, 0.5, 1.0)  # of the questions for trials: how many were asked at the end of each rung
LEAST = 12  # questions, or chunks of a text


@dataclass(frozen=True, slots=True)
class Portions:
    """Indices of questions: those of each rung, and those for the end; each in ascending order."""

    rungs: tuple[tuple[int, ...], ...]
    last: tuple[int, ...]


def divide(n: int, held_out: float, seed: str) -> Portions:
    """Divide so many questions at random.

    Parameters
    ----------
    n : int
        At least `LEAST`.
    held_out : float
        Fraction for the end.
    seed : str
        The same seed divides alike.
    """
    order = random.Random(seed).sample(range(n), n)
    n_last = min(max(round(held_out * n), 1), n - len(RUNGS))
    tried = order[n_last:]
    ends = [max(round(part * len(tried)), i + 1) for i, part in enumerate(RUNGS)]
    cuts = zip((0, *ends), ends, strict=False)
    return Portions(
        tuple(tuple(sorted(tried[start:end])) for start, end in cuts), tuple(sorted(order[:n_last]))
    )


def divide_task(task: Task, held_out: float, seed: int) -> tuple[tuple[Task, ...], Task]:
    """Divide a task: one for each rung, and one for the end.

    Raises
    ------
    FormatError
        It has too few questions.
    """
    n = len(task.questions)
    if n < LEAST:
        limited = n < task.n_total
        has = (
            f"has {task.n_total} questions, of which --limit takes {n}"
            if limited
            else f"has {n} questions"
        )
        remedy = "take more" if limited else "give more"
        raise FormatError(f"{has}, and a search needs {LEAST} to divide; {remedy}", path=task.path)
    portions = divide(n, held_out, f"{seed} {task.name}")
    return tuple(_part(task, rung) for rung in portions.rungs), _part(task, portions.last)


def _part(task: Task, wanted: Sequence[int]) -> Task:
    return replace(
        task,
        questions=tuple(task.questions[i] for i in wanted),
        indices=tuple(task.indices[i] for i in wanted),
    )
