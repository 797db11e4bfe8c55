"""New weights without a stop: the new file is loaded beside the old one and asked, then it answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import StrictBool

from edgemerge.errors import BudgetError, EdgemergeError, VerificationError
from edgemerge.runtime.engine.messages import Chat, Ended, Generation, Piece, Sampling
from edgemerge.runtime.engine.process import EngineFailure
from edgemerge.runtime.serve.errors import SERVER, TOO_LARGE, Refusal
from edgemerge.runtime.serve.loaded import Loaded
from edgemerge.runtime.serve.models import ModelFile, find_stamps
from edgemerge.runtime.serve.requests import RELOAD, Body
from edgemerge.runtime.serve.routes import Routes
from edgemerge.runtime.serve.store import ModelStore
from edgemerge.runtime.smoke import MAX_TOKENS, QUESTIONS, SECONDS

__all__ = ["Reloader", "add_reload"]

log = logging.getLogger(__name__)


class ReloadRequest(Body):
    """Which model, by default all; and whether it must answer a question first."""

    ask: StrictBool = True


class Reloader:
    """Replaces models by what their files have become.

    Parameters
    ----------
    models : ModelStore
        The models.
    """

    def __init__(self, models: ModelStore) -> None:
        self._models = models
        self._turn = asyncio.Lock()

    async def reload(self, name: str, *, asks: bool = True) -> dict[str, Any]:
        """Let a model's file of now answer; requests that run end with the old one.

        Parameters
        ----------
        name : str
            The model's.
        asks : bool
            Refuse a file that answers a simple question worse than the old one. To go back to a model
            that is known, nothing is asked; nor is the file that answered last.

        Returns
        -------
        dict
            Name, and fingerprints of before and now.

        Raises
        ------
        Refusal
            409 where the new one is not taken; the old one goes on answering. As of `ModelStore.start`.
        """
        path = self._models.resolve(name).path
        return await self.replace(name, path, lambda: None, then=path, asks=asks)

    async def replace(
        self,
        name: str,
        path: Path,
        note: Callable[[], object],
        *,
        then: Path,
        asks: bool = True,
    ) -> dict[str, Any]:
        """Let another file answer in the place of a model.

        Parameters
        ----------
        name : str
            The model's.
        path : Path
            The file.
        note : function
            Called when the file has been loaded and has answered, before requests come to it; where it
            raises, the old one stays.
        then : Path
            What stands for the file from then on, as a link to it does.
        asks : bool
            As of `reload`.

        Returns
        -------
        dict
            As of `reload`.

        Raises
        ------
        Refusal
            As of `reload`.
        """
        async with self._turn, self._models.locked(name):
            before = next(state for state in self._models.states() if state.id == name)
            file = replace(self._models.resolve(name), path=path)
            new = await self._load(file, asks=asks)
            try:
                await asyncio.to_thread(note)
            except BaseException:
                await self._models.drop(new)
                raise
            new.file = replace(new.file, path=then)
            self._models.adopt(new)
        log.info("%s is reloaded", name)
        now = new.facts.fingerprint
        return {"id": name, "system_fingerprint": now, "previous_fingerprint": before.fingerprint}

    async def reload_all(self) -> None:
        """Reload all that can be; what is not taken stands in the log."""
        for name in self._models.reloadable:
            try:
                await self.reload(name)
            except Refusal as refusal:
                log.error("%s", refusal)

    async def _load(self, old: ModelFile, *, asks: bool) -> Loaded:
        file = replace(old, stamps=find_stamps(old.path))  # all that is known if it cannot be read
        try:
            file = await self._models.read(old)
            new = await self._models.start(file)
        except Refusal:
            raise
        except VerificationError as error:
            raise self._refuse(file, "it is not signed as required", error) from None
        except BudgetError as error:
            raise self._refuse(file, f"it {TOO_LARGE}", error, is_bad=False) from None
        except EdgemergeError as error:  # another time there may be more memory for it
            raise self._refuse(file, "it does not load", error, is_bad=False) from None
        is_new = file.stamps != old.stamps
        try:
            if asks and is_new and (fault := await self._find_fault(new)) is not None:
                raise self._refuse(file, fault)
        except BaseException:
            await self._models.drop(new)
            raise
        return new

    async def _find_fault(self, new: Loaded) -> str | None:
        """Ask the new model what `merge` asks after a merge; what the old one did too is no fault."""
        try:
            if new.facts.reads_whole or new.facts.can_rerank:
                return None  # it writes nothing
            fault = await _find_oddity(new)
        except EngineFailure as failure:
            return f"it fails when it is asked a simple question ({failure})"
        if fault is None or (old := self._models.hold(new.file.name)) is None:
            return fault
        try:
            return None if await _find_oddity(old) == fault else fault
        except EngineFailure:
            return None
        finally:
            self._models.release(old)

    def _refuse(
        self,
        file: ModelFile,
        why: str,
        error: EdgemergeError | None = None,
        *,
        is_bad: bool = True,
    ) -> Refusal:
        self._models.refuse(file, is_bad=is_bad)
        if error is not None:
            log.error("%s", error)
        old = "goes on" if file.name in self._models.loaded else "is closed"
        return Refusal(
            409,
            f"the new file of {file.name!r} is not taken, and the old one {old}: {why}",
            kind=SERVER,
            code="model_refused",
        )


async def _find_oddity(loaded: Loaded) -> str | None:
    """Ask a model a simple question; say what is odd with the answer."""
    text, loops = await _ask(loaded)
    if not text.strip():
        return "it has no answer to a simple question"
    return "it repeats itself when it is asked a simple question" if loops else None


async def _ask(loaded: Loaded) -> tuple[str, bool]:
    """Ask a model a question; its answer, and whether it repeated itself."""
    prompt = Chat([{"role": "user", "content": QUESTIONS[0]}])
    wanted = Generation(
        prompt if loaded.facts.has_template else QUESTIONS[0],
        MAX_TOKENS,
        Sampling(temperature=0.0),
    )
    text, loops = "", False
    try:
        async with (
            asyncio.timeout(SECONDS),
            aclosing(loaded.process.generate(wanted)) as events,
        ):
            async for event in events:
                if isinstance(event, Piece):
                    text += event.text
                elif isinstance(event, Ended):
                    loops = event.reason == "loop"
    except TimeoutError:  # what it has said by then counts
        pass
    return text, loops


def add_reload(routes: Routes, reloader: Reloader, models: ModelStore) -> None:
    """Add the route."""

    @routes.post(RELOAD, ReloadRequest)
    async def reload(body: ReloadRequest) -> dict[str, Any]:
        names = [models.resolve(body.model).name] if body.model else models.reloadable
        return {"models": [await reloader.reload(name, asks=body.ask) for name in names]}
