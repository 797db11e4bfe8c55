"""The report of a search as one HTML page without scripts, fonts or links, with a picture of its trials."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from edgemerge.reports.record import Record, Section, record_page

__all__ = ["search_page"]

WIDTH, HEIGHT = 760, 300  # SVG units
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 34
SMALL = (236, 150)  # a panel of one setting, below its name
TITLE, GAP = 20, 16
N_LABELS = 4


def search_page(result: Mapping[str, Any], sections: Sequence[Section]) -> str:
    """Write the page.

    Parameters
    ----------
    result : mapping
        What `edgemerge search --json` prints.
    sections : sequence of Section
        What there is to say in words.
    """
    pictures = (
        Section(
            "The trials",
            (
                (
                    "A dot is a trial: filled where it was asked all questions, open where it was stopped "
                    "before. The line is the best so far; the dashed one is the start.",
                    None,
                ),
            ),
            picture="".join(_trials(result)),
        ),
        Section(
            "The settings",
            (("Each dot is a trial that was asked all questions; the best one is dark.", None),),
            picture="".join(_settings(result)),
        ),
    )
    return record_page(Record(f"Search of {result['recipe']}", (*sections, *pictures)))


class _Axes:
    """A panel: data to SVG units."""

    def __init__(
        self, size: tuple[int, int], x: tuple[float, float], y: tuple[float, float]
    ) -> None:
        self.size, self._x, self._y = size, _widened(x), _widened(y)

    def at(self, x: float, y: float) -> tuple[float, float]:
        width, height = self.size
        across = (x - self._x[0]) / (self._x[1] - self._x[0])
        up = (y - self._y[0]) / (self._y[1] - self._y[0])
        return (
            LEFT + across * (width - LEFT - RIGHT),
            height - BOTTOM - up * (height - TOP - BOTTOM),
        )

    def grid(self) -> Iterator[str]:
        """Draw lines of equal height with their values at the left."""
        low, high = self._y
        for i in range(N_LABELS):
            y = low + (high - low) * i / (N_LABELS - 1)
            left, at = self.at(self._x[0], y)
            right, _ = self.at(self._x[1], y)
            yield f"<path d='M{left:.1f} {at:.1f}H{right:.1f}' stroke='var(--rest)'/>"
            yield f"<text x='{left - 6:.1f}' y='{at + 4:.1f}' text-anchor='end'>{y:.1f}</text>"

    def label(self, x: float, text: str, anchor: str) -> str:
        """Write below the panel."""
        across, _ = self.at(x, self._y[0])
        y = self.size[1] - BOTTOM + 18
        return f"<text x='{across:.1f}' y='{y}' text-anchor='{anchor}'>{escape(text)}</text>"


def _widened(span: tuple[float, float]) -> tuple[float, float]:
    low, high = span
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _trials(result: Mapping[str, Any]) -> Iterator[str]:
    """Draw scores over the numbers of trials."""
    trials = result["trials"]
    scored = [one for one in trials if one["scores"]]
    lasts = [one["scores"][-1] for one in scored]
    axes = _Axes((WIDTH, HEIGHT), (0, len(trials) - 1), (min(lasts), max(lasts)))
    yield f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='Scores of the trials'>"
    yield from axes.grid()
    start = trials[0]["score"]
    (left, y), (right, _) = axes.at(0, start), axes.at(len(trials) - 1, start)
    yield f"<path d='M{left:.1f} {y:.1f}H{right:.1f}' stroke='var(--ink)' stroke-dasharray='4 4'/>"
    yield f"<path d='{_best_line(axes, trials)}' fill='none' stroke='var(--bar)' stroke-width='2'/>"
    for one in scored:
        x, y = axes.at(one["number"], one["scores"][-1])
        fill = "var(--bar)" if one["score"] is not None else "none"
        yield f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4' fill='{fill}' stroke='var(--bar)'/>"
    yield axes.label(0, "start", "start")
    yield axes.label(len(trials) - 1, f"trial {len(trials) - 1}", "end")
    yield "</svg>"


def _best_line(axes: _Axes, trials: Sequence[Mapping[str, Any]]) -> str:
    """Go through the best score after each trial, by steps."""
    best = trials[0]["score"]
    x, y = axes.at(0, best)
    path = f"M{x:.1f} {y:.1f}"
    for one in trials[1:]:
        if one["score"] is not None and one["is_kept"]:
            best = max(best, one["score"])
        x, y = axes.at(one["number"], best)
        path += f"H{x:.1f}V{y:.1f}"
    return path


def _settings(result: Mapping[str, Any]) -> Iterator[str]:
    """Draw for each setting the scores over its values, three panels in a row."""
    full = [one for one in result["trials"] if one["score"] is not None]
    spaces = result["spaces"]
    width, height = SMALL[0] + GAP, SMALL[1] + TITLE + GAP
    rows = -(-len(spaces) // 3)
    yield f"<svg viewBox='0 0 {3 * width} {rows * height}' role='img' "
    yield "aria-label='Scores over each setting'>"
    for i, space in enumerate(spaces):
        yield f"<g transform='translate({i % 3 * width} {i // 3 * height + TITLE})'>"
        yield from _setting(space, full, result["best"])
        yield "</g>"
    yield "</svg>"


def _setting(
    space: Mapping[str, Any], full: Sequence[Mapping[str, Any]], best: int
) -> Iterator[str]:
    scores = [one["score"] for one in full]
    options = space.get("options") or (space["low"], space["high"])

    def place(value: Any) -> float:
        if "options" in space:
            return float(options.index(value))
        return math.log(value) if space["is_log"] else float(value)

    span = (place(options[0]), place(options[-1]))
    axes = _Axes(SMALL, span, (min(scores), max(scores)))
    yield f"<text x='{LEFT}' y='0'>{escape(space['name'])}</text>"
    yield from axes.grid()
    for one in sorted(full, key=lambda trial: trial["number"] == best):
        x, y = axes.at(place(one["values"][space["name"]]), one["score"])
        colour = "var(--ink)" if one["number"] == best else "var(--bar)"
        radius = 5 if one["number"] == best else 3
        yield f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{radius}' fill='{colour}'/>"
    yield axes.label(span[0], _say(options[0]), "start")
    yield axes.label(span[1], _say(options[-1]), "end")


def _say(value: bool | float | str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return value if isinstance(value, str) else f"{value:g}"
