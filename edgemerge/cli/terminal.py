"""What all commands have in common: errors, JSON, progress, tables on the terminal."""

from __future__ import annotations

import functools
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import typer

from edgemerge.errors import EdgemergeError, RuntimeFailure
from edgemerge.plain_text import plain
from edgemerge.suggestions import suggest_path
from edgemerge.types import BeginPart, Progress

__all__ = [
    "check_picture",
    "check_stop",
    "plain",
    "print_json",
    "print_table",
    "progress_bar",
    "progress_bars",
    "span",
    "speaks_plainly",
    "talks_plainly",
]

P = ParamSpec("P")
R = TypeVar("R")


class SignalReceived(KeyboardInterrupt):
    """Ctrl-C, a closed terminal, or the system asks to stop; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        self.number = number


_stops: list[int] = []  # signals that the running command has received


def speaks_plainly(command: Callable[P, R]) -> Callable[P, R]:
    """Turn what a command raises into one sentence on stderr and an exit code."""
    return _guard(command, "nothing was changed", is_stopped_once=True)


def talks_plainly(command: Callable[P, R]) -> Callable[P, R]:
    """Do the same for a command that only talks: when interrupted, it has nothing to reassure of.

    It may also take a signal for less than its end, so that another one counts again.
    """
    return _guard(command, "", is_stopped_once=False)


def _guard(command: Callable[P, R], kept: str, *, is_stopped_once: bool) -> Callable[P, R]:
    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with _stoppable(is_stopped_once=is_stopped_once):
            try:
                result = command(*args, **kwargs)
                if sys.stdout is not None:
                    sys.stdout.flush()  # here, where a full disk can still be told
                return result
            except BrokenPipeError:
                raise  # the reader went away, as head does: typer ends without a word
            except (EdgemergeError, KeyboardInterrupt, MemoryError, OSError) as error:
                raise _explain(error, kept) from None

    return wrapped


def _explain(error: BaseException, kept: str) -> typer.Exit:
    """Say what stopped a command, and what it noted on how to go on; `kept`: else, if interrupted."""
    notes = getattr(error, "__notes__", [])
    match error:
        case EdgemergeError():
            detail = error.detail if isinstance(error, RuntimeFailure) else ""
            return _failure("; ".join((str(error), *notes)), detail)
        case KeyboardInterrupt():
            number = error.number if isinstance(error, SignalReceived) else signal.SIGINT
            parts = filter(None, ("interrupted", *(notes or [kept])))
            return _failure("; ".join(parts), code=128 + number)
        case OSError():
            where = f"{error.filename}: " if error.filename else ""
            hint = suggest_path(error.filename) or "; check the path" if _is_missing(error) else ""
            return _failure("; ".join((f"{where}{error.strerror or error}{hint}", *notes)))
    remedy = "close other programs or, in a merge, give a smaller --memory"
    return _failure("; ".join(("out of memory", remedy, *notes)))


def _is_missing(error: OSError) -> bool:
    return isinstance(error, FileNotFoundError) and isinstance(error.filename, str)


def _failure(sentence: str, detail: str = "", code: int = 1) -> typer.Exit:
    print(f"edgemerge: {plain(sentence)}", file=sys.stderr)
    if detail:
        print(detail, file=sys.stderr)
    return typer.Exit(code)


@contextmanager
def _stoppable(*, is_stopped_once: bool) -> Iterator[None]:
    """Let a signal raise `SignalReceived`, where nobody else, such as nohup, has a say in it.

    An exception is lost where Python is just inside a callback of its own, as while importing Numba;
    so the signal is also remembered, and `check_stop` asks for it. `is_stopped_once`: a second signal
    changes nothing, as the command is tidying up by then.
    """

    def stop(number: int, _frame: object) -> None:
        _stops.append(number)
        if len(_stops) == 1 or not is_stopped_once:
            raise SignalReceived(number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.getsignal(number) for number in wanted}
    taken = [n for n, old in before.items() if old in (signal.SIG_DFL, signal.default_int_handler)]
    _stops.clear()
    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])


def check_stop(_done: int = 0, _total: int = 0) -> None:
    """Raise `SignalReceived` where a signal came; a progress callback that shows nothing."""
    if _stops:
        raise SignalReceived(_stops[0])


def print_json(document: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout, and nothing else there."""
    is_utf8 = sys.stdout is not None and (sys.stdout.encoding or "").lower() == "utf-8"
    print(json.dumps(document, ensure_ascii=not is_utf8, allow_nan=False, indent=2))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: str = "") -> None:
    """Print columns by their widest entry; `right` names those that align to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [
            cell.rjust(width) if name in right.split() else cell.ljust(width)
            for name, cell, width in zip(header, row, widths, strict=True)
        ]
        print(plain("  ".join(cells)).rstrip())


def span(values: Sequence[float], form: str) -> str:
    """Write the least and the largest of some figures, or the one that all have."""
    texts = [f"{value:{form}}" if value else "0" for value in (min(values), max(values))]
    return texts[0] if texts[0] == texts[1] else " to ".join(texts)


def check_picture(plot: Path, models: Sequence[Path], *, force: bool) -> None:
    """Refuse a picture that cannot or must not be made, before any work.

    Raises
    ------
    OutputError, RuntimeFailure
        It exists or is a model, or Matplotlib is not installed.
    """
    from edgemerge.formats.files import real_path
    from edgemerge.output.file import check_output
    from edgemerge.reports.plots import check_matplotlib

    if plot.suffix.lower() != ".png":
        raise typer.BadParameter(f"--plot {plot} must end in .png")
    check_matplotlib()
    check_output(plot, tuple(real_path(path) for path in models), force=force)


@contextmanager
def progress_bar(
    label: str, *, quiet: bool = False, unit: str | None = None
) -> Iterator[Callable[[int, int], None]]:
    """Show how far it is and the time left on stderr while it is a terminal; stop on a signal.

    Without a `unit`, what is counted are bytes, and their rate is shown too.
    """
    with progress_bars(label, quiet=quiet, unit=unit) as (progress, _):
        yield progress


@contextmanager
def progress_bars(
    label: str, *, quiet: bool = False, unit: str | None = None
) -> Iterator[tuple[Progress, BeginPart]]:
    """Do the same for work in several parts; yields also what shows a bar for a part.

    A program that runs the command may ask for lines instead (`edgemerge.cli.progress_lines`).
    """
    from edgemerge.cli.progress_lines import Lines, take_descriptor

    descriptor = take_descriptor()
    if descriptor is not None:
        lines = Lines(descriptor, label, unit, check_stop)
        yield lines.whole, lines.begin
        return
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        yield check_stop, lambda _label, _unit=None: check_stop
        return
    from edgemerge.cli.progress import show_bars

    with show_bars(label, unit, check_stop) as bars:
        yield bars.whole, bars.begin
