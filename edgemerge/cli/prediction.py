"""What `edgemerge plan` says of time: on a named board, or on this machine where it was measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from edgemerge.planning.prediction import Rates
    from edgemerge.types import Plan

__all__ = ["BoardName", "find_machine", "prediction_as_json", "prediction_lines"]

BoardName = Annotated[
    str | None,
    typer.Option(
        "--board",
        metavar="NAME",
        help="Predict the merge on pi5, pi4, pi-zero-2w or orin-nano, with as many threads as that board has "
        "cores [default: this machine, where doctor --bench measured it].",
    ),
]


def find_machine(board: str | None) -> Rates | None:
    """Find what a plan is for: the board of that name, or this machine, or None where nobody measured it."""
    if board is None:
        from edgemerge.runtime.doctor.rates import kept_rates

        return kept_rates()
    from edgemerge.planning.boards import BOARDS

    if board not in BOARDS:
        raise typer.BadParameter(f"--board {board} is not known; these are: {', '.join(BOARDS)}")
    return BOARDS[board]


def prediction_lines(the_plan: Plan, machine: Rates | None) -> Iterator[str]:
    """Say how long the merge takes, and why."""
    from edgemerge.planning.network import foresee_network
    from edgemerge.planning.prediction import predict
    from edgemerge.sizes import format_size

    if machine is None:
        return
    found = predict(the_plan, machine)
    storage = "not known" if found.storage is None else _seconds(found.storage)
    yield (
        f"time on {machine.name}: about {_seconds(found.seconds)}, {_seconds(found.least)} to "
        f"{_seconds(found.most)}"
    )
    yield (
        f"  processor {_seconds(found.processor)} with {the_plan.workers} of {machine.cores} cores, "
        f"memory {_seconds(found.memory)}, storage {storage}; they overlap"
    )
    if found.storage is None:
        yield "note: doctor --bench could not measure the storage, so its time is not counted"
    if foresee_network(the_plan).n_models:
        yield "note: the time of the network is not counted"
    if the_plan.needed_bytes > machine.memory:
        yield (
            f"note: it needs {format_size(the_plan.needed_bytes)} of memory, and programs have "
            f"{format_size(machine.memory)} there: give a smaller --memory"
        )


def prediction_as_json(the_plan: Plan, machine: Rates | None) -> dict[str, object]:
    """Return the same as numbers."""
    from edgemerge.planning.prediction import predict

    if machine is None:
        return {}
    return {"prediction": {"machine": machine.name, **predict(the_plan, machine).as_json()}}


def _seconds(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"
