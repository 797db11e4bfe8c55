"""The page of a fleet: which devices need somebody, what they run, score and failed at; without scripts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from edgemerge.reports.record import Record, Section, record_page

__all__ = ["fleet_page"]

WIDTH, ROW = 760, 30  # SVG units: of the picture, of a task
LEFT, RIGHT = 190, 20
MAX_LABEL = 26  # characters of a task's name


def fleet_page(
    title: str, sections: Sequence[Section], scores: Sequence[tuple[str, Sequence[float], float]]
) -> str:
    """Write the page.

    Parameters
    ----------
    title : str
        Its heading.
    sections : sequence of Section
        What there is to say in words and tables.
    scores : sequence of (str, sequence of float, float)
        Tasks, each device's part of right answers, from 0 to 1, and the median.
    """
    if scores:
        says = "A dot is a device: the right answers of its current model. The line is the median."
        picture = Section("Scores", ((says, None),), picture="".join(_picture(scores)))
        sections = (*sections, picture)
    return record_page(Record(title, tuple(sections)))


def _picture(scores: Sequence[tuple[str, Sequence[float], float]]) -> Iterator[str]:
    height = ROW * len(scores) + 24
    yield f"<svg viewBox='0 0 {WIDTH} {height}' role='img' aria-label='Scores of the devices'>"
    for percent in range(0, 101, 25):
        x = _across(percent / 100)
        yield f"<path d='M{x:.1f} 0V{height - 24}' stroke='var(--rest)'/>"
        yield f"<text x='{x:.1f}' y='{height - 6}' text-anchor='middle'>{percent} %</text>"
    for i, (task, values, median) in enumerate(scores):
        yield from _task(task, values, median, ROW * i + ROW / 2)
    yield "</svg>"


def _task(task: str, values: Sequence[float], median: float, y: float) -> Iterator[str]:
    label = task if len(task) <= MAX_LABEL else f"{task[: MAX_LABEL - 1]}…"
    yield f"<text x='0' y='{y + 4:.1f}'>{escape(label)}</text>"
    for value in values:
        x = _across(value)
        yield f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4' fill='var(--bar)' fill-opacity='.5'/>"
    x = _across(median)
    yield f"<path d='M{x:.1f} {y - 10:.1f}v20' stroke='var(--ink)' stroke-width='2'/>"


def _across(part: float) -> float:
    return LEFT + part * (WIDTH - LEFT - RIGHT)
