"""What a search found, in words: for the terminal, the report page and the recipe's comments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from edgemerge.sizes import format_duration

__all__ = ["HELD_OUT", "held_out_rows", "held_out_sentences", "say_best", "say_trials"]
__all__ += ["say_value", "value_rows"]

HELD_OUT = ("held out", "of", "start", "best", "difference (95 %)", "p")


def say_best(result: Mapping[str, Any]) -> str:
    """Say which trial is the best: `trial 37 of 60, score 66.40 (the start 61.10)`."""
    trials = result["trials"]
    start, best = trials[0]["score"], trials[result["best"]]["score"]
    if result["best"] == 0:
        return f"no trial of {len(trials)} was better than the start, whose score is {start:.2f}"
    return f"trial {result['best']} of {len(trials)}, score {best:.2f} (the start {start:.2f})"


def say_trials(result: Mapping[str, Any]) -> str:
    """Say how many trials there were, and why there are no more."""
    trials = result["trials"]
    refused = sum(bool(one["refusal"]) for one in trials)
    stopped = sum(one["score"] is None for one in trials) - refused
    parts = [f"{len(trials)} trials in {format_duration(result['seconds'])}"]
    parts += [f"{stopped} stopped early"] if stopped else []
    parts += [f"{refused} refused"] if refused else []
    return f"{', '.join(parts)}; {result['ended']}"


def value_rows(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """List each setting with its start and its best value."""
    best = result["trials"][result["best"]]["values"]
    return [
        (space["name"], say_value(space["start"]), say_value(best[space["name"]]))
        for space in result["spaces"]
    ]


def say_value(value: object) -> str:
    """Write a setting as the recipe has it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def held_out_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """List what the held-out questions say of the start and the best: a row per task and text."""
    found = result["held_out"]
    rows = [_row(one) for one in found["verdicts"]]
    mean = found["mean"]
    if mean is not None and mean["name"] not in (one["name"] for one in found["verdicts"]):
        rows.append(_row(mean))
    return rows


def _row(one: Mapping[str, Any]) -> tuple[str, ...]:
    is_text = one["is_text"]
    unit = "" if is_text else " %"
    form = ".3f" if is_text else ".1f"
    p = one["p"]
    return (
        one["name"],
        f"{one['n']} {'tokens' if is_text else 'questions'}",
        f"{one['start']:{form}}{unit}",
        f"{one['best']:{form}}{unit}",
        f"{one['difference']:+.1f}{' %' if is_text else ''} ({_interval(one)})",
        "" if p is None else f"{p:.3f}" if p >= 0.0005 else "< 0.001",
    )


def _interval(one: Mapping[str, Any]) -> str:
    return "no interval" if one["low"] is None else f"{one['low']:+.1f} to {one['high']:+.1f}"


def held_out_sentences(result: Mapping[str, Any]) -> Iterator[str]:
    """Say what is shown of what is to be kept, and whether the questions were asked before."""
    found = result["held_out"]
    for one in found["verdicts"]:
        if one["margin"] is None:
            continue
        what = f"{one['margin']:g} {'percent' if one['is_text'] else 'points'}"
        if one["is_kept"]:
            yield f"{one['name']} is kept: it loses less than {what} (95 % interval)"
        elif one["low"] is None:
            yield f"{one['name']} may lose more than {what}: the chunks held out of it are too few to tell"
        else:
            yield f"{one['name']} may lose more than {what}: the held-out questions do not rule it out"
    if found["earlier"]:
        times = "once" if found["earlier"] == 1 else f"{found['earlier']} times"
        yield (
            f"the held-out questions were asked {times} before, for a best trial of then: the figures "
            "are a little too good"
        )
