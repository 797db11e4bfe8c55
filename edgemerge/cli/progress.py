"""Bars on stderr: the work as a whole, and below it the part of it that runs now."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column
from rich.text import Text

from edgemerge import types

__all__ = ["Bars", "show_bars"]


class Bars:
    """Bars that stop on a signal whenever they are told something.

    Parameters
    ----------
    bars : rich.progress.Progress
        Where they are shown; `Counts` among its columns.
    label, unit : str
        Of the work as a whole; without a unit, what is counted are bytes.
    check_stop : callable
        Raises where the work is to stop.
    """

    def __init__(
        self, bars: Progress, label: str, unit: str | None, check_stop: Callable[[], None]
    ) -> None:
        self._bars = bars
        self._check_stop = check_stop
        self._part: TaskID | None = None
        self.whole = self._add(label, unit)

    def begin(self, label: str, unit: str | None = None) -> types.Progress:
        """Show a bar for a part of the work, in the place of the part before."""
        if self._part is not None:
            self._bars.remove_task(self._part)
        return self._add(label, unit, is_part=True)

    def _add(self, label: str, unit: str | None, *, is_part: bool = False) -> types.Progress:
        task = self._bars.add_task(label, total=None, unit=unit)
        if is_part:
            self._part = task

        def show(done: int, total: int) -> None:
            self._check_stop()
            self._bars.update(task, completed=done, total=total)

        return show


@contextmanager
def show_bars(label: str, unit: str | None, check_stop: Callable[[], None]) -> Iterator[Bars]:
    """Show bars until the end of the block, which takes them away; arguments as of `Bars`."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        Counts(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bars:
        yield Bars(bars, label, unit, check_stop)


class Counts(ProgressColumn):
    """How much is done of how much: bytes and their rate, or the task's unit."""

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=True))  # where it is narrow, the bar gives way
        self._bytes, self._rate = DownloadColumn(binary_units=True), TransferSpeedColumn()

    def render(self, task: Task) -> Text:
        """Show one task."""
        if unit := task.fields["unit"]:
            total = "?" if task.total is None else f"{task.total:.0f}"
            return Text(f"{task.completed:.0f}/{total} {unit}", style="progress.download")
        return Text.assemble(self._bytes.render(task), " ", self._rate.render(task))
