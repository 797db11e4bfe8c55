"""A cluster on this machine begins with the workers that are there."""

from __future__ import annotations

from typing import Any

import pytest

from edgemerge.cluster import connection as module


class Client:
    """Three workers, whatever was hoped for."""

    def nthreads(self) -> dict[str, int]:
        return {f"tcp://{i}": 1 for i in range(3)}


def test_a_worker_that_is_gone_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    connect: Any = Client
    connection = module.Connection("local:4", connect, 4)
    assert len(connection.workers()) == 3
