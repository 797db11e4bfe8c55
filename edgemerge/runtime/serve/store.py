"""The models of a server: each in a process of its own, started on demand, closed when memory is short."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from edgemerge.errors import EdgemergeError, RecipeError
from edgemerge.runtime.serve.errors import (
    BUSY,
    NO_ROOM_BESIDE_KEPT,
    NO_ROOM_FOR_BOTH,
    NO_ROOM_NOW,
    Refusal,
    cannot_load,
    unavailable,
)
from edgemerge.runtime.serve.loaded import Loaded, ModelState, Slot
from edgemerge.runtime.serve.models import ModelFile, check_size, find_stamps
from edgemerge.runtime.serve.queue import Room

__all__ = ["ModelStore"]

log = logging.getLogger(__name__)

_WATCH_SECONDS = 1.0


class ModelStore:
    """The models by name; all of it runs in one event loop.

    Parameters
    ----------
    files : sequence of ModelFile
        At least one; the first answers requests that name none.
    start : function
        Starts a process with a model.
    read : function
        Reads the header of a model's file again.
    budget : int
        Bytes that the server may take, with the processes of its models.
    floor : int
        Bytes that it takes without any model.

    Raises
    ------
    RecipeError
        Two files have one name.
    BudgetError
        A model does not fit, even alone.
    """

    def __init__(
        self,
        files: Sequence[ModelFile],
        start: Callable[[ModelFile], Awaitable[Loaded]],
        read: Callable[[ModelFile], Awaitable[ModelFile]],
        *,
        budget: int,
        floor: int,
    ) -> None:
        self.budget = budget
        self.default = files[0].name
        self.changed: Callable[[], None] = lambda: None  # called when there may be more room
        self.reserved = 0  # bytes of the budget that work beside the models has
        self.read = read
        self._start = start
        self._floor = floor
        self._slots = {file.name: Slot(file) for file in files}
        self._retired: list[Loaded] = []
        self._starting: list[ModelFile] = []
        self._beside: list[Loaded] = []  # started, and neither adopted nor dropped
        self._ends: set[asyncio.Task[None]] = set()
        for file in files:
            if self._slots[file.name].file is not file:
                raise RecipeError(
                    f"two models are called {file.name}: name one of them, as in other={file.path}"
                )
            check_size(file, floor, budget)

    def __iter__(self) -> Iterator[ModelFile]:
        """Files of all models."""
        return (slot.file for slot in self._slots.values())

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of those in memory."""
        return tuple(name for name, slot in self._slots.items() if slot.loaded is not None)

    @property
    def reloadable(self) -> tuple[str, ...]:
        """Names of those in memory, and of those whose file has changed since it was read."""
        return tuple(
            name
            for name, slot in self._slots.items()
            if slot.loaded is not None or find_stamps(slot.file.path) not in ((), slot.file.stamps)
        )

    @property
    def taken(self) -> int:
        """Bytes that the server may take with the models that are in memory, or about to be."""
        return self._floor + self._taken()

    @property
    def pids(self) -> list[int]:
        """Processes of all models, with those that a reload brings or has replaced."""
        now = [slot.loaded for slot in self._slots.values() if slot.loaded is not None]
        found = [loaded.process.pid for loaded in (*now, *self._beside, *self._retired)]
        return [pid for pid in found if pid is not None]

    def states(self) -> list[ModelState]:
        """How each model is."""
        for slot in self._slots.values():
            self._bury(slot)
        return [slot.state() for slot in self._slots.values()]

    def resolve(self, name: str | None) -> ModelFile:
        """File of the model that a request means.

        Raises
        ------
        Refusal
            404: there is no such model.
        """
        if name is None:
            name = self.default
        if name not in self._slots:
            raise Refusal(404, f"The model {name[:100]!r} does not exist.", code="model_not_found")
        return self._slots[name].file

    # -- places, for the queue

    def room_for(self, model: str) -> Room:
        """Whether one more request may begin."""
        slot = self._slots[model]
        if slot.places or slot.loaded is not None or slot.is_coming:
            facts = slot.loaded.facts if slot.loaded is not None else slot.file
            return Room.FREE if slot.places < facts.n_sequences else Room.FULL
        if self._floor + self._kept(model) + slot.file.need > self.budget:
            return Room.FREE  # to be refused: it would wait in vain, with all others behind it
        fits = self._floor + self._in_use() + slot.file.need <= self.budget
        return Room.FREE if fits else Room.SHUT

    def take(self, model: str) -> None:
        """Count one more request."""
        self._slots[model].places += 1

    def give_back(self, model: str) -> None:
        """Count one less."""
        slot = self._slots[model]
        slot.places -= 1
        slot.used = time.monotonic()

    # -- models

    async def open(self, name: str) -> Loaded:
        """Give a model to a request that has a place; it is started if need be. `release` must follow.

        Raises
        ------
        Refusal
            503 where its file is gone, 500 where llama.cpp refuses it; the log has the reason.
        """
        slot = self._slots[name]
        while (loaded := self.hold(name)) is None:
            if slot.loading is None:
                slot.loading = asyncio.create_task(self._load(slot))
                slot.loading.add_done_callback(_hear)
            # not cancelled with the request: others wait for it, or will
            await asyncio.shield(slot.loading)
        return loaded

    def hold(self, name: str) -> Loaded | None:
        """Give a model that is in memory; None where it is not. `release` must follow."""
        slot = self._slots[name]
        self._bury(slot)
        if slot.loaded is not None:
            slot.loaded.users += 1
        return slot.loaded

    def release(self, loaded: Loaded) -> None:
        """End one use of a model."""
        loaded.users -= 1
        if loaded.is_retired and not loaded.users:
            self._retired.remove(loaded)
            self._end(loaded)
        self._bury(self._slots[loaded.file.name])

    @asynccontextmanager
    async def locked(self, name: str) -> AsyncIterator[None]:
        """Let nothing else start a model, nor close it; who asks for it while it is closed waits."""
        try:
            async with self._slots[name].lock:
                yield
        finally:
            self.changed()

    async def start(self, file: ModelFile) -> Loaded:
        """Start a process beside the ones that are there, with others closed to make room.

        `adopt` or `drop` must follow.

        Raises
        ------
        Refusal
            503 where there is no room.
        BudgetError
            It does not fit, even alone.
        EdgemergeError
            It does not load, or is not signed.
        """
        await self._make_room(file)
        log.info("loading %s", file.name)
        self._starting.append(file)
        try:
            loaded = await self._start(file)
        finally:
            self._starting.remove(file)
        self._beside.append(loaded)
        self._slots[file.name].starts += 1
        return loaded

    def adopt(self, new: Loaded) -> None:
        """Let a model answer in place of the one of its name, which ends with its last request."""
        self._beside.remove(new)
        slot = self._slots[new.file.name]
        old, slot.loaded, slot.file = slot.loaded, new, new.file
        slot.was_lost, slot.refused, slot.bad = False, None, None
        slot.used = time.monotonic()
        if old is not None:
            old.is_retired = True
            if old.users:
                self._retired.append(old)
            else:
                self._end(old)
        self.changed()

    async def drop(self, new: Loaded) -> None:
        """End a model that was started and is not taken."""
        try:
            await new.process.close()
        finally:
            self._beside.remove(new)
            self.changed()

    def refuse(self, file: ModelFile, *, is_bad: bool) -> None:
        """Note that a reload does not take the file in a model's place, so that the old one stays open.

        No start takes it before a reload does, if it `is_bad`. The file that answers now is not refused.
        """
        slot = self._slots[file.name]
        if file.path != slot.file.path or file.stamps == slot.file.stamps:
            return
        slot.refused = file.stamps
        if is_bad:
            slot.bad = file.stamps

    async def watch(self, idle_seconds: float) -> None:
        """Take note of processes that end, and close models that nobody has used for so long (0: never).

        Runs until it is cancelled.
        """
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            for name, slot in self._slots.items():
                self._bury(slot)
                unused = time.monotonic() - slot.used
                if idle_seconds and unused > idle_seconds and slot.may_close:
                    log.info("closing %s, which nobody uses", name)
                    await self._close(slot)

    async def close(self) -> None:
        """End all processes."""
        for slot in self._slots.values():
            if slot.loading is not None:
                slot.loading.cancel()
                await asyncio.wait((slot.loading,))
            if slot.loaded is not None:
                await self._close(slot)
        for loaded in (*self._beside, *self._retired):
            await loaded.process.close()
        await asyncio.gather(*self._ends)

    async def _load(self, slot: Slot) -> None:
        try:
            async with slot.lock:
                if slot.loaded is None:  # a reload may have brought it
                    self.adopt(await self.start(await self._read_again(slot)))
        except Refusal:
            raise
        except EdgemergeError as error:
            log.error("%s", error)
            raise cannot_load(slot.file.name, error) from None
        finally:
            slot.loading = None
            self.changed()

    async def _read_again(self, slot: Slot) -> ModelFile:
        """Read the header of a closed model's file, which may have been replaced meanwhile."""
        file = slot.file
        if not file.path.is_file():
            log.error("%s: the file is gone", file.path)
            raise unavailable(f"the file of the model {file.name!r} is not there at the moment")
        file = await self.read(file)
        if file.stamps == slot.bad:
            log.error("%s: was refused by a reload, so it is not loaded", file.path)
            raise unavailable(
                f"a reload has refused the new file of {file.name!r}, and the old one is not in memory any "
                'more: put a better one there, or reload this one with "ask": false'
            )
        return file

    async def _make_room(self, file: ModelFile) -> None:
        """Close idle models; not the one that has the file's name, which a reload wants beside it."""
        check_size(file, self._floor, self.budget)
        others = [slot for name, slot in self._slots.items() if name != file.name]
        old = self._slots[file.name].loaded
        least = self._floor + (old.file.need if old is not None else 0) + file.need
        why = None
        if least > self.budget:
            why = NO_ROOM_FOR_BOTH
        elif least + self._kept(file.name) > self.budget:
            why = NO_ROOM_BESIDE_KEPT
        while self._floor + self._taken() + file.need > self.budget:
            idle = [slot for slot in others if why is None and slot.may_close]
            if not idle:
                raise Refusal(
                    503,
                    why or NO_ROOM_NOW,
                    kind=BUSY,
                    code="model_unavailable",
                    retry_after=5,
                )
            oldest = min(idle, key=lambda slot: slot.used)
            log.info("closing %s to make room", oldest.file.name)
            await self._close(oldest)

    def _taken(self) -> int:
        """Bytes of all that is in memory, or about to be, and of what is reserved."""
        now = [slot.file for slot in self._slots.values() if slot.loaded is not None]
        now += [*self._starting, *(one.file for one in (*self._beside, *self._retired))]
        return self.reserved + sum(file.need for file in now)

    def _in_use(self) -> int:
        """Bytes of what is in memory and cannot be closed, and of what requests are about to load."""
        starting = {file.name for file in (*self._starting, *(one.file for one in self._beside))}
        idle = sum(slot.file.need for slot in self._slots.values() if slot.may_close)
        wanted = (
            slot.file.need
            for name, slot in self._slots.items()
            if slot.places and slot.loaded is None and name not in starting
        )
        return self._taken() - idle + sum(wanted)

    def _kept(self, name: str) -> int:
        """Bytes of the models but one that stay, however long it waits."""
        others = (slot for other, slot in self._slots.items() if other != name)
        return sum(slot.file.need for slot in others if slot.is_kept)

    async def _close(self, slot: Slot) -> None:
        loaded, slot.loaded = slot.loaded, None
        if loaded is not None:
            await loaded.process.close()

    def _bury(self, slot: Slot) -> None:
        """Take note of a process that has ended by itself."""
        if slot.loaded is None or slot.loaded.process.is_alive:
            return
        log.error("the process of %s has ended; the next request starts another", slot.file.name)
        slot.crashes += 1
        slot.was_lost = True
        loaded, slot.loaded = slot.loaded, None
        self._end(loaded)

    def _end(self, loaded: Loaded) -> None:
        """End a process, with nobody waiting for that."""
        task = asyncio.get_running_loop().create_task(self._finish(loaded.process.close()))
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)

    async def _finish(self, closing: Coroutine[Any, Any, None]) -> None:
        await closing
        self.changed()


def _hear(loading: asyncio.Task[None]) -> None:
    """Take a failure that nobody waits for any more."""
    if not loading.cancelled():
        loading.exception()
