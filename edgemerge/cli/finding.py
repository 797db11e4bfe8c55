"""Options of all commands that read models: where these lie, and whether they may be fetched."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgemerge.cli.terminal import check_stop, plain

if TYPE_CHECKING:
    from edgemerge.finding.finder import Finder

__all__ = ["Download", "KeepRemote", "ModelsFolder", "Spill", "make_finder"]

ModelsFolder = Annotated[
    Path | None,
    typer.Option(
        "--models",
        metavar="DIR",
        help="Folder with models by their names on the hub: DIR/ORG/NAME or DIR/NAME.",
    ),
]
Download = Annotated[
    bool,
    typer.Option(
        "--download",
        help="Fetch models that are not on this machine from the hub, into its cache.",
    ),
]
Spill = Annotated[
    Path | None,
    typer.Option(
        "--spill",
        metavar="DIR",
        help="Folder for what is read more than once of models at addresses, until the end.",
    ),
]
KeepRemote = Annotated[
    Path | None,
    typer.Option(
        "--keep-remote",
        metavar="DIR",
        help="Folder in which models at addresses are kept whole, each file by its SHA-256.",
    ),
]


def make_finder(
    folder: Path | None,
    download: bool,
    *,
    quiet: bool = False,
    streams: bool = False,
    spill: Path | None = None,
    keep: Path | None = None,
) -> Finder:
    """Make what finds a command's models; a download shows a bar unless `quiet`.

    `streams` lets the command read models at addresses; the last two are folders for these.

    Raises
    ------
    typer.BadParameter
        A folder is none (exit code 2).
    """
    from edgemerge.cli.terminal import progress_bar
    from edgemerge.finding.finder import Finder

    if folder is not None and not folder.is_dir():
        raise typer.BadParameter(f"--models {folder}: there is no such folder")
    if spill is not None and not spill.is_dir():
        raise typer.BadParameter(f"--spill {spill}: there is no such folder")
    can_ask = all(s is not None and s.isatty() for s in (sys.stdin, sys.stderr))
    return Finder(
        folder,
        download,
        _ask if can_ask else None,
        partial(progress_bar, quiet=quiet),
        streams,
        spill,
        keep,
        _say,
    )


def _say(sentence: str) -> None:
    print(f"note: {plain(sentence)}", file=sys.stderr)


def _ask(question: str) -> bool:
    try:
        return typer.confirm(question, err=True)
    except typer.Abort:  # which is also what Click makes of Ctrl-C
        print(file=sys.stderr)
        check_stop()
        return False
