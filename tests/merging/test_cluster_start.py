"""A cluster on this machine begins with the workers that are there, and says what became of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from edgemerge.cluster import connection as module
from edgemerge.errors import ClusterError


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


def test_processes_that_all_ended_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: after a minute, the remedy was a worker at local:2."""
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.0)
    connect: Any = Client
    states = [None, -9]
    children: Any = [SimpleNamespace(poll=lambda n=n: states[n]) for n in range(2)]
    connection = module.Connection("local:2", connect, 2, children)
    assert len(connection.workers()) == 3
    states[0] = -9
    words = (
        "all processes of local:2 ended, perhaps for lack of memory; give a smaller --memory, or"
    )
    with pytest.raises(ClusterError, match=words):
        connection.workers()


def test_a_worker_without_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: it was told as a difference of versions."""

    def work(_shared: object, _argument: object) -> None:
        raise MemoryError

    found = SimpleNamespace(address="tcp://board:4")
    monkeypatch.setattr("distributed.get_worker", lambda: found)
    words = "the worker at tcp://board:4 has too little memory; give it less --memory, or fewer --threads"
    with pytest.raises(ClusterError, match=words):
        module._call(work, None, None)
