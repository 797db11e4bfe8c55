"""The start and the best trial on questions that no trial was asked, compared question by question."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgemerge.runtime.evaluation.answers import Answers
from edgemerge.runtime.evaluation.evaluate import Mark
from edgemerge.runtime.evaluation.paired import differ_in_marks, differ_in_perplexity
from edgemerge.runtime.evaluation.perplexity import Chunk, perplexity_of
from edgemerge.searching.objective import Objective

__all__ = ["Verdict", "judge", "mean_verdict"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """One task or text, or the mean of tasks.

    Attributes
    ----------
    name : str
        Of the task or text.
    n : int
        Questions, or scored tokens.
    start, best : float
        Percent of right answers, or perplexity.
    difference, low, high : float
        Of the best less the start: percentage points, or percent of perplexity; with its 95 % interval, which
        is infinite where a text has too few chunks.
    p : float or None
        McNemar's, of a task.
    margin : float or None
        What may be lost, where it is to be kept.
    is_kept : bool or None
        Whether the interval rules out that more than the margin is lost.
    is_text : bool
        Whether it is a text, with perplexities.
    """

    name: str
    n: int
    start: float
    best: float
    difference: float
    low: float
    high: float
    p: float | None = None
    margin: float | None = None
    is_kept: bool | None = None
    is_text: bool = False


def judge(start: Answers, best: Answers, objective: Objective) -> list[Verdict]:
    """Compare two models' answers: a verdict for each task, then for each text."""
    found = [
        _judge_task(name, start.marks[name], best.marks[name], objective.keeps.get(name))
        for name in start.marks
    ]
    found += [
        _judge_text(name, start.chunks[name], best.chunks[name], objective.keeps.get(name))
        for name in start.chunks
    ]
    return found


def mean_verdict(verdicts: Sequence[Verdict], weights: Mapping[str, float]) -> Verdict | None:
    """Average the tasks that have a weight, if any; errors add up as those of independent tasks."""
    parts = [
        (one, weights.get(one.name, 0.0))
        for one in verdicts
        if one.p is not None and one.name in weights
    ]
    parts = [(one, weight) for one, weight in parts if weight]
    if not parts:
        return None
    total = sum(weight for _, weight in parts)
    start, best = (
        sum(weight * value for value, weight in values) / total
        for values in (
            [(one.start, weight) for one, weight in parts],
            [(one.best, weight) for one, weight in parts],
        )
    )
    halves = (_half_width(one) * weight for one, weight in parts)
    half = math.sqrt(sum(one**2 for one in halves)) / total
    middle = best - start
    n = sum(one.n for one, _ in parts)
    name = f"mean of {len(parts)} tasks" if len(parts) > 1 else parts[0][0].name
    low, high = max(middle - half, -100.0), min(middle + half, 100.0)
    return Verdict(name, n, start, best, middle, low, high)


def _half_width(one: Verdict) -> float:
    """Half the interval as it was before one of its ends was cut at 100 points."""
    return max(one.high - one.difference, one.difference - one.low)


def _judge_task(
    name: str, start: Sequence[Mark], best: Sequence[Mark], margin: float | None
) -> Verdict:
    found = differ_in_marks(start, best)
    before, after = (100 * sum(one.right for one in marks) / len(marks) for marks in (start, best))
    is_kept = None if margin is None else found.low > -margin
    return Verdict(
        name,
        len(start),
        before,
        after,
        found.middle,
        found.low,
        found.high,
        found.p,
        margin,
        is_kept,
    )


def _judge_text(
    name: str, start: Sequence[Chunk], best: Sequence[Chunk], margin: float | None
) -> Verdict:
    found = differ_in_perplexity(start, best)
    first, second = perplexity_of(start), perplexity_of(best)
    return Verdict(
        name,
        first.n_tokens,
        first.value,
        second.value,
        found.middle,
        found.low,
        found.high,
        margin=margin,
        is_kept=None if margin is None else found.high < margin,
        is_text=True,
    )
