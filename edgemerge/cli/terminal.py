"""What all commands share of the terminal: errors, JSON, progress, tables."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import typer

from edgemerge.errors import EdgemergeError, RuntimeFailure

__all__ = ["print_json", "print_table", "progress_bar", "speaks_plainly"]

P = ParamSpec("P")
R = TypeVar("R")


def speaks_plainly(command: Callable[P, R]) -> Callable[P, R]:
    """Turn what a command raises into one sentence on stderr and an exit code."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except EdgemergeError as error:
            print(f"edgemerge: {error}", file=sys.stderr)
            if isinstance(error, RuntimeFailure) and error.detail:
                print(error.detail, file=sys.stderr)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            print("edgemerge: interrupted; nothing was changed", file=sys.stderr)
            raise typer.Exit(130) from None
        except MemoryError:
            print("edgemerge: out of memory; give a smaller --memory", file=sys.stderr)
            raise typer.Exit(1) from None
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            print(f"edgemerge: {where}{error.strerror or error}", file=sys.stderr)
            raise typer.Exit(1) from None

    return wrapped


def print_json(document: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout, and nothing else there."""
    print(json.dumps(document, ensure_ascii=False, indent=2))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: str = "") -> None:
    """Print columns by their widest entry; `right` names those that align to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [
            cell.rjust(width) if name in right.split() else cell.ljust(width)
            for name, cell, width in zip(header, row, widths, strict=True)
        ]
        print("  ".join(cells).rstrip())


@contextmanager
def progress_bar(label: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None] | None]:
    """Show bytes, rate and time left on stderr while it is a terminal; else yield None."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
