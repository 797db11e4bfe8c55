"""Two models' answers to the same questions, as the page shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgemerge.runtime.evaluation.intervals import difference_interval
from edgemerge.runtime.evaluation.questions import FORMATS
from edgemerge.runtime.serve.merging.offers import Offer
from edgemerge.site.record import Score

__all__ = ["compare_tasks", "name_tasks", "scores_of"]


def name_tasks(files: Sequence[Offer]) -> dict[str, Path]:
    """Give each file of questions a name for `edgemerge eval`: none twice, none that means a benchmark."""
    named: dict[str, Path] = {}
    for file in files:
        name = file.name.replace("=", "-")
        number = 2 if name in named or name in FORMATS else 1
        while number > 1 and f"{name} {number}" in named:
            number += 1
        named[name if number == 1 else f"{name} {number}"] = file.path
    return named


def compare_tasks(document: Mapping[str, Any], first: str, second: str) -> list[dict[str, Any]]:
    """Put what `edgemerge eval --json` says of two models into a row for each task.

    Parameters
    ----------
    document : mapping
        What it printed.
    first, second : str
        Paths of the models, as it was given them.

    Returns
    -------
    list of dict
        Task, questions, those that each model has right, the difference of the second less the first with
        its 95 % interval (parts of 1), and McNemar's p.
    """
    rows = []
    for pair in document["comparisons"]:
        found = {one["model"]: one for one in document["results"] if one["task"] == pair["task"]}
        n = found[first]["n"]
        low, high = difference_interval(n, pair["only_first"], pair["only_second"])
        rows.append(
            {
                "task": pair["task"],
                "n": n,
                "right": [_right(found[model]) for model in (first, second)],
                "only": [pair["only_first"], pair["only_second"]],
                "difference": pair["difference"],
                "low": low,
                "high": high,
                "p": pair["p"],
            }
        )
    return rows


def _right(result: Mapping[str, Any]) -> int:
    right: int = round(result["acc"] * result["n"])
    return right


def scores_of(rows: Sequence[Mapping[str, Any]], which: int) -> dict[str, Score]:
    """Scores of the first (0) or second (1) model by task, for its record."""
    return {row["task"]: Score(row["right"][which], row["n"]) for row in rows}
