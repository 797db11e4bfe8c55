"""Progress for a program that runs a command: lines of JSON on a file descriptor.

The program names the descriptor in `EDGEMERGE_PROGRESS_FD`. A line is one look at the work, or at the part
of it that runs now; `unit` null means bytes::

    {"label": "ties -> ward.gguf", "is_part": false, "unit": null, "done": 1048576, "total": 90177536}
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress

import typer

from edgemerge import types
from edgemerge.runtime.complaint import PROGRESS_FD

__all__ = ["Lines", "take_descriptor"]

_PERIOD = 0.2  # seconds between two lines of one label


def take_descriptor() -> int | None:
    """Return the descriptor that the environment names, if any.

    Raises
    ------
    typer.BadParameter
        It is no number of an open descriptor (exit code 2).
    """
    text = os.environ.get(PROGRESS_FD)
    if text is None:
        return None
    try:
        os.fstat(int(text))
    except (ValueError, OSError, OverflowError):
        raise typer.BadParameter(
            f"{PROGRESS_FD} is {text!r}; it must be the number of an open file descriptor"
        ) from None
    return int(text)


class Lines:
    """Progress as lines, which stops on a signal whenever it is told something.

    Parameters
    ----------
    descriptor : int
        Where lines go.
    label, unit : str
        Of the work as a whole; without a unit, what is counted are bytes.
    check_stop : callable
        Raises where the work is to stop.
    """

    def __init__(
        self, descriptor: int, label: str, unit: str | None, check_stop: Callable[[], None]
    ) -> None:
        self._descriptor = descriptor
        self._check_stop = check_stop
        self.whole = self._add(label, unit)

    def begin(self, label: str, unit: str | None = None) -> types.Progress:
        """Tell of a part of the work, in the place of the part before."""
        return self._add(label, unit, is_part=True)

    def _add(self, label: str, unit: str | None, *, is_part: bool = False) -> types.Progress:
        last = float("-inf")

        def show(done: int, total: int) -> None:
            nonlocal last
            self._check_stop()
            now = time.monotonic()
            if done < total and now - last < _PERIOD:
                return
            last = now
            self._write(
                {"label": label, "is_part": is_part, "unit": unit, "done": done, "total": total}
            )

        return show

    def _write(self, document: dict[str, object]) -> None:
        with suppress(BrokenPipeError):  # nobody reads any more, which is no reason to stop
            os.write(self._descriptor, json.dumps(document).encode() + b"\n")
