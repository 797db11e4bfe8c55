"""Options of the commands that read a registry."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgemerge.cli.terminal import plain

if TYPE_CHECKING:
    from edgemerge.fleet.registry.client import Registry

__all__ = ["State", "Trust", "print_left_out"]

Trust = Annotated[
    Path,
    typer.Option(
        "--trust",
        metavar="ROOT.json",
        help="The registry's root, which you got by a way that you trust.",
    ),
]
State = Annotated[
    Path | None,
    typer.Option(
        "--state",
        metavar="DIR",
        help="Folder of what this machine has seen of the registry, by which old files are refused "
        "[default: in ~/.cache/edgemerge/registries].",
    ),
]


def print_left_out(there: Registry) -> None:
    """Say on stderr which entries of a registry were left out, if any."""
    if (note := there.note()) is not None:
        print(f"note: {plain(note)}", file=sys.stderr)
