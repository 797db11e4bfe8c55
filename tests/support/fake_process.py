"""Stands for a model's process, without one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from edgemerge.errors import RuntimeFailure
from edgemerge.runtime.engine.options import EngineFacts
from edgemerge.runtime.serve.active_request import Run
from edgemerge.runtime.serve.loaded import Loaded
from edgemerge.runtime.serve.models import ModelFile
from edgemerge.runtime.serve.queue import Queue
from edgemerge.runtime.serve.store import ModelStore
from edgemerge.runtime.serve.turns import Turn

__all__ = ["FakeProcess", "Loader", "keep", "make_facts", "make_turn"]


def make_facts(**facts: Any) -> EngineFacts:
    """What a small model says of itself."""
    usual: dict[str, Any] = {
        "n_ctx": 64,
        "n_sequences": 2,
        "n_vocab": 300,
        "has_template": True,
        "reads_whole": False,
        "can_rerank": False,
        "fingerprint": "fp_0",
    }
    return EngineFacts(**(usual | facts))


class FakeProcess:
    """A process that only lives and ends."""

    pid: int | None = None

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_alive = True

    async def close(self) -> None:
        await asyncio.sleep(0)
        self.is_alive = False


class Loader:
    """Starts fakes, and fails where the file says so; stands for what starts processes.

    Attributes
    ----------
    started : list of FakeProcess
        All of them.
    may_go : asyncio.Event
        What a start waits for.
    """

    def __init__(self) -> None:
        self.started: list[FakeProcess] = []
        self.may_go = asyncio.Event()
        self.may_go.set()

    async def __call__(self, file: ModelFile) -> Loaded:
        await self.may_go.wait()
        if file.path.read_bytes() == b"bad":
            raise RuntimeFailure(f"{file.path}: cannot be served")
        process = FakeProcess(file.name)
        self.started.append(process)
        facts = make_facts(fingerprint=f"fp_{len(self.started)}")
        return Loaded(file, process, facts)  # type: ignore[arg-type]

    def alive(self) -> list[str]:
        return [process.name for process in self.started if process.is_alive]


async def keep(file: ModelFile) -> ModelFile:
    """Stands for reading a header again that is as it was."""
    return file


async def make_turn(process: FakeProcess, n_places: int) -> tuple[Turn, Queue]:
    """Give a request a place at a fake process called a, in which so many may be answered at a time."""
    file = ModelFile("a", Path(__file__), 64, 0, 0, {}, 0, n_sequences=n_places)
    store = ModelStore([file], Loader(), keep, budget=1, floor=0)
    loaded = await store.start(file)
    loaded.facts = make_facts(n_sequences=n_places)
    loaded.process = process  # type: ignore[assignment]
    store.adopt(loaded)
    queue = Queue(store, 9, 60.0)
    await queue.enter("a")
    return Turn(loaded, Run("/v1/completions"), queue), queue
