"""Temperature and throttling of the board while something runs."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from edgemerge.runtime.board.device import read_temperature, read_throttling

__all__ = ["Heat", "HeatWatch"]

_INTERVAL = 1.0  # seconds; a Raspberry Pi tells its throttling through a program, which costs some


@dataclass(frozen=True, slots=True)
class Heat:
    """What the sensors said.

    Attributes
    ----------
    start, end, highest : float or None
        Degrees Celsius of the hottest sensor of the processor; None where there is none.
    slowed_by : tuple of str or None
        What slowed the processor down at any time meanwhile; None where the board does not tell.
    """

    start: float | None
    end: float | None
    highest: float | None
    slowed_by: tuple[str, ...] | None


class HeatWatch:
    """Reads the sensors each second while its `with` statement runs; `heat` is there after it."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="edgemerge-heat", daemon=True)
        self._temperatures: list[float] = []
        self._reasons: dict[str, None] | None = None
        self._before: tuple[str, ...] = ()  # what had happened since boot when this started

    def __enter__(self) -> HeatWatch:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _run(self) -> None:
        while not self._stop.wait(_INTERVAL):
            self._look()

    def _look(self) -> None:
        if (temperature := read_temperature()) is not None:
            self._temperatures.append(temperature)
        if (throttling := read_throttling()) is not None:
            if self._reasons is None:
                self._reasons, self._before = {}, throttling.since_boot
            new = (event for event in throttling.since_boot if event not in self._before)
            self._reasons |= dict.fromkeys((*throttling.reasons, *new))

    @property
    def heat(self) -> Heat:
        """What was read from start to end."""
        seen = self._temperatures
        return Heat(
            start=seen[0] if seen else None,
            end=seen[-1] if seen else None,
            highest=max(seen, default=None),
            slowed_by=None if self._reasons is None else tuple(self._reasons),
        )
