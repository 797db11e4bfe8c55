from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import chain, repeat

import pytest

from edgemerge.runtime.bench import heat
from edgemerge.runtime.bench.heat import Heat, HeatWatch
from edgemerge.runtime.board.device import Throttling


def test_start_end_and_highest_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    cooled = threading.Event()

    def temperatures() -> Iterator[float]:
        yield from (50.0, 81.5)
        while True:
            cooled.set()
            yield 64.0

    readings = temperatures()
    states = chain(
        [Throttling((), ("under-voltage",)), Throttling(("throttled",), ("under-voltage",))],
        repeat(Throttling((), ("under-voltage", "too hot (1 times)"))),
    )
    monkeypatch.setattr(heat, "_INTERVAL", 0.005)
    monkeypatch.setattr(heat, "read_temperature", lambda: next(readings))
    monkeypatch.setattr(heat, "read_throttling", lambda: next(states))
    with HeatWatch() as watch:
        assert cooled.wait(20.0)
    # what had happened before is not this run's
    assert watch.heat == Heat(50.0, 64.0, 81.5, ("throttled", "too hot (1 times)"))


def test_a_board_without_sensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heat, "read_temperature", lambda: None)
    monkeypatch.setattr(heat, "read_throttling", lambda: None)
    with HeatWatch() as watch:
        pass
    assert watch.heat == Heat(None, None, None, None)
