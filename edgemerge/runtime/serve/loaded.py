"""What is loaded under a model's name, who wants it, and what /health tells of that."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from edgemerge.runtime.engine.options import EngineFacts
from edgemerge.runtime.engine.process import ModelProcess
from edgemerge.runtime.serve.models import ModelFile, Stamps, find_stamps

__all__ = ["Loaded", "ModelState", "Slot"]


@dataclass(slots=True, eq=False)
class Loaded:
    """A model in memory; a reload leaves the old one beside the new until nobody uses it."""

    file: ModelFile
    process: ModelProcess
    facts: EngineFacts
    users: int = 0
    is_retired: bool = False
    sha256: str | None = None  # of the file when it was loaded, where requests are logged


@dataclass(frozen=True, slots=True)
class ModelState:
    """What /health tells of a model; `state` is loading, loaded, crashed or closed."""

    id: str
    state: str
    bytes: int
    running: int
    sequences: int
    starts: int
    crashes: int
    fingerprint: str | None


@dataclass(slots=True, eq=False)
class Slot:
    """A model's name: what is loaded under it, and who wants it."""

    file: ModelFile  # what answers, or was the last to; before the first start, what was there
    loaded: Loaded | None = None
    loading: asyncio.Task[None] | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # of a start, or of a reload
    refused: Stamps | None = None  # of the file that a reload found in its place and did not take
    bad: Stamps | None = None  # of the one that answered badly, or is not signed: no start takes it
    places: int = 0  # requests that run, or wait for it to be loaded
    used: float = 0.0
    starts: int = 0
    crashes: int = 0
    was_lost: bool = False  # its process has ended by itself, and none has been started since

    @property
    def is_coming(self) -> bool:
        """Whether it is about to be in memory, or to be replaced."""
        return self.loading is not None or self.lock.locked()

    @property
    def is_kept(self) -> bool:
        """Whether it stays in memory: the file in its place was refused, or that is gone, too."""
        if self.loaded is None or self.refused is None:
            return False
        return find_stamps(self.file.path) in ((), self.refused)

    @property
    def may_close(self) -> bool:
        """Whether it is in memory and nobody wants it; not while a reload may yet refuse its new file."""
        if self.loaded is None or self.places or self.loaded.users or self.lock.locked():
            return False
        return not self.is_kept

    def state(self) -> ModelState:
        """How the model is."""
        state = "crashed" if self.was_lost else "closed"
        if self.loaded is not None:
            state = "loaded"
        if self.loading is not None:
            state = "loading"
        return ModelState(
            id=self.file.name,
            state=state,
            bytes=self.file.n_bytes,
            running=self.places,
            sequences=self.file.n_sequences,
            starts=self.starts,
            crashes=self.crashes,
            fingerprint=None if self.loaded is None else self.loaded.facts.fingerprint,
        )
