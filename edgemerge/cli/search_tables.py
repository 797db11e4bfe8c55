"""What `edgemerge search` tells: as JSON, as a table, as comments of the recipe that it writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemerge.cli.terminal import plain, print_table
from edgemerge.searching.words import (
    HELD_OUT,
    held_out_rows,
    held_out_sentences,
    say_best,
    say_trials,
    value_rows,
)

if TYPE_CHECKING:
    from edgemerge.reports.record import Section
    from edgemerge.searching.search import Search
    from edgemerge.searching.trials import Trial

__all__ = ["as_json", "print_result", "report_sections", "summary"]


def as_json(
    search: Search,
    reason: str,
    best: Trial,
    look: Mapping[str, Any],
    output: Path,
    report: Path | None,
) -> dict[str, Any]:
    """Return all that was found as plain types."""
    finished = search.trials.finished
    return {
        "output": str(output),
        "report": None if report is None else str(report),
        "trials_file": str(search.trials.path),
        "recipe": str(search.recipe.path),
        "ended": reason,
        "seconds": round(sum(one.seconds for one in finished), 3),
        "best": best.number,
        "spaces": [asdict(space) for space in search.recipe.spaces],
        "weights": dict(search.objective.weights),
        "margins": dict(search.objective.keeps),
        "trials": [
            {**_trial(one), "is_kept": search.objective.keeps_all(one.figures, finished[0].figures)}
            for one in finished
        ],
        "held_out": dict(look),
    }


def _trial(one: Trial) -> dict[str, Any]:
    return {
        "number": one.number,
        "values": dict(one.values),
        "score": one.score,
        "scores": list(one.scores),
        "figures": [asdict(figures) for figures in one.figures],
        "seconds": one.seconds,
        "refusal": one.refusal,
    }


def summary(result: Mapping[str, Any]) -> Iterator[str]:
    """Say in a few lines what was found, for the head of the recipe."""
    yield f"found by edgemerge search in {Path(result['recipe']).name}: {say_best(result)}"
    yield from held_out_sentences(result)
    for name, n, start, best, difference, *_ in held_out_rows(result):
        yield f"{name}, {n} held out: {start} -> {best}, {difference}"


def report_sections(result: Mapping[str, Any]) -> tuple[Section, ...]:
    """Say it for the report page."""
    from edgemerge.reports.record import Section

    said = [say_best(result), say_trials(result)]
    return (
        Section(
            "What was found",
            [(sentence, None) for sentence in said],
            ("setting", "start", "best"),
            value_rows(result),
        ),
        Section(
            "On held-out questions",
            [(sentence, None) for sentence in held_out_sentences(result)],
            HELD_OUT,
            held_out_rows(result),
        ),
    )


def print_result(result: Mapping[str, Any]) -> None:
    """Say on stdout what was found."""
    print(f"{plain(result['output'])}  {say_best(result)}")
    print(f"  {say_trials(result)}")
    print_table(("setting", "start", "best"), value_rows(result), right="start best")
    print()
    print_table(HELD_OUT, held_out_rows(result), right="of start best")
    for sentence in held_out_sentences(result):
        print(sentence)
    if result["report"]:
        print(f"report: {plain(result['report'])}")
