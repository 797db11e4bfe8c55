"""A model in a process of its own, as the server's event loop sees it."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from itertools import count
from tempfile import TemporaryFile
from typing import IO, Any

from edgemerge.errors import RuntimeFailure
from edgemerge.runtime.child_end import describe_end
from edgemerge.runtime.engine.messages import (
    AllEmbedded,
    Begun,
    Embedded,
    Ended,
    Failed,
    Generation,
    Piece,
    PromptScored,
)
from edgemerge.runtime.engine.options import EngineFacts, EngineOptions
from edgemerge.runtime.engine.wire import Unpacker, pack
from edgemerge.runtime.rpc.loss import read_last_words

__all__ = ["EngineFailure", "ModelProcess"]

log = logging.getLogger(__name__)

_CLOSE_SECONDS = 5.0
_LAST_BYTES = 1000  # of what a process wrote before its end
_MODEL = 0  # the key of messages about the model itself
_LAST = (Ended, AllEmbedded, Failed)  # of a request's events


class EngineFailure(Exception):
    """A request that gets no answer, or no more of it.

    Parameters
    ----------
    reason : str
        One sentence for the client.
    status : int
        HTTP's number.
    """

    def __init__(self, reason: str, status: int) -> None:
        self.reason = reason
        self.status = status
        super().__init__(reason)


class ModelProcess:
    """A model that is computed by a process of its own; all of it runs in one event loop.

    The process may end at any time: llama.cpp aborts on what it does not expect, the kernel ends it when
    memory is short. All who wait for it then get `EngineFailure` (503), and `start` makes another one.

    Parameters
    ----------
    options : EngineOptions
        The model, and what it may use.
    """

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self._child: _Child | None = None
        self._facts: EngineFacts | None = None
        self._starting = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        """Number of the process; None while there is none."""
        return self._child.process.pid if self._child is not None else None

    @property
    def is_alive(self) -> bool:
        """Whether the model is loaded and its process runs."""
        return self._child is not None and self._facts is not None and not self._child.is_gone

    async def start(self) -> EngineFacts:
        """Start the process and wait until the model is loaded; where it runs already, nothing happens.

        Raises
        ------
        EdgemergeError
            The model cannot be loaded.
        """
        async with self._starting:
            if self._facts is not None and self.is_alive:
                return self._facts
            self._facts = None
            child = self._child = await _start_child()
            try:
                facts = await child.ask("load", self.options, key=_MODEL)
            except EngineFailure as failure:
                self._child = None
                raise RuntimeFailure(
                    f"{self.options.path}: while it was loaded, {failure.reason}",
                    detail="" if child.lost else child.last_words,
                ) from failure
            except BaseException:
                self._child = None
                await child.close()
                raise
            if isinstance(facts, Exception):
                self._child = None
                await child.close()
                raise facts
            assert isinstance(facts, EngineFacts)
            self._facts = facts
            return facts

    def generate(
        self, wanted: Generation
    ) -> AsyncGenerator[Begun | PromptScored | Piece | Ended, None]:
        """Compute an answer and give what comes of it; closing the iterator ends the computation at once.

        Raises
        ------
        EngineFailure
            400 where the model cannot take the request, 503 where its process ended.
        """
        return self._running().stream("generate", wanted)

    async def tokenize(self, text: str, *, add_special: bool) -> list[int]:
        """Tokens of a text; with `add_special` begun and ended as the model wants it.

        Raises
        ------
        EngineFailure
            As of `generate`.
        """
        tokens: list[int] = await self._running().ask("tokenize", text, add_special)
        return tokens

    async def detokenize(self, tokens: list[int]) -> str:
        """Text of tokens, control tokens by their names.

        Raises
        ------
        EngineFailure
            As of `generate`.
        """
        text: str = await self._running().ask("detokenize", tokens)
        return text

    async def embed(self, inputs: list[str | list[int]]) -> tuple[list[str], int]:
        """Embed texts, or their tokens: vectors of length 1, and how many tokens the inputs have.

        Vectors are as `edgemerge.runtime.engine.vectors` writes them: thousands are megabytes.

        Raises
        ------
        EngineFailure
            As of `generate`; 400 where the vectors are too much; 500 where one is no number.
        """
        return await self._embed_all("embed", inputs)

    async def rerank(self, query: str, texts: list[str]) -> tuple[list[float], int]:
        """Say how well texts answer a question, the more the better, and how many tokens that took.

        Raises
        ------
        EngineFailure
            As of `generate`; 400 where the model does not order texts.
        """
        return await self._embed_all("rerank", query, texts)

    async def _embed_all(self, job: str, *asked: Any) -> tuple[list[Any], int]:
        found: list[Any] = []
        n_tokens = 0
        async with aclosing(self._running().stream(job, *asked)) as events:
            async for event in events:
                if isinstance(event, Embedded):
                    found.append(event.value)
                else:
                    n_tokens = event.n_tokens
        return found, n_tokens

    async def close(self) -> None:
        """End the process; all who wait for it get `EngineFailure`."""
        child, self._child, self._facts = self._child, None, None
        if child is not None:
            await child.close()

    def _running(self) -> _Child:
        if self._child is None or self._facts is None:
            raise EngineFailure("the model is not loaded", 503)
        return self._child


class _Child(asyncio.Protocol):
    """One process, and those who wait for it."""

    def __init__(self, process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
        self.process = process
        self._errors = errors  # what it writes there, as llama.cpp does before it aborts
        self.is_gone = False
        self.last_words = ""
        self.lost: str | None = None  # what it said of an rpc worker, whose end was its own
        self._waiting: dict[int, asyncio.Queue[Any]] = {}
        self._keys = count(1)
        self._unpacker = Unpacker()
        self._transport: asyncio.Transport | None = None
        self._ended = asyncio.Event()

    # -- what the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the way to the process."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Hand events to those who wait for them."""
        for events in self._unpacker.push(data):
            for key, event in events:
                if (queue := self._waiting.get(key)) is not None:
                    queue.put_nowait(event)

    def connection_lost(self, error: Exception | None) -> None:
        """Tell all who wait that the process has ended."""
        self.is_gone = True
        self._end_task = asyncio.ensure_future(self._tell_end())

    async def _tell_end(self) -> None:
        with suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self.process.wait, _CLOSE_SECONDS)
        self.last_words = _read_end(self._errors)
        self.lost = read_last_words(self.last_words)
        if self.lost is not None:
            log.error("%s", self.lost)
        for queue in self._waiting.values():
            queue.put_nowait(self._failure())
        self._ended.set()

    def _failure(self) -> Failed:
        return Failed(self.lost or f"the model's process {describe_end(self.process.poll())}", 503)

    # -- what the model does

    async def stream(self, job: str, *asked: Any) -> AsyncGenerator[Any, None]:
        """Ask for something that comes in several events, the last of which is of `_LAST`."""
        key, queue = self._send(job, *asked)
        is_ended = False
        try:
            while not is_ended:
                event = await queue.get()
                if type(event) is list:
                    yield Piece(*event)
                    continue
                is_ended = isinstance(event, _LAST)
                yield _checked(event)
        finally:
            self._forget(key, is_ended)

    async def ask(self, job: str, *asked: Any, key: int | None = None) -> Any:
        """Ask for something that comes at once."""
        key, queue = self._send(job, *asked, key=key)
        is_ended = False
        try:
            event = await queue.get()
            is_ended = True
            return _checked(event)
        finally:
            self._forget(key, is_ended)

    def _send(
        self, job: str, *asked: Any, key: int | None = None
    ) -> tuple[int, asyncio.Queue[Any]]:
        if key is None:
            key = next(self._keys)
        queue: asyncio.Queue[Any] = asyncio.Queue()
        if self._ended.is_set():
            queue.put_nowait(self._failure())
        self._waiting[key] = queue
        if self._transport is not None and not self.is_gone:
            self._transport.write(pack((job, key, *asked)))
        return key, queue

    def _forget(self, key: int, is_ended: bool) -> None:
        del self._waiting[key]
        if not is_ended and not self.is_gone and self._transport is not None:
            self._transport.write(pack(("cancel", key)))

    async def close(self) -> None:
        """End the process: it ends when it finds its socket closed."""
        if self._transport is not None:
            self._transport.close()
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._ended.wait()
        except TimeoutError:
            self.process.kill()
            await self._ended.wait()


async def _start_child() -> _Child:
    ours, theirs = socket.socketpair()
    errors = TemporaryFile()  # noqa: SIM115 (closed when the process has ended)
    with theirs:
        try:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "edgemerge.runtime.engine.child",
                    str(theirs.fileno()),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=(theirs.fileno(),),
            )
        except OSError as error:
            ours.close()
            raise RuntimeFailure(
                f"the model needs a process of its own, which cannot start ({error.strerror}): "
                "end other programs"
            ) from error
    ours.setblocking(False)
    _, child = await asyncio.get_running_loop().create_connection(
        lambda: _Child(process, errors), sock=ours
    )
    return child


def _checked(event: Any) -> Any:
    """Give an event, or raise what it tells of."""
    if isinstance(event, Failed):
        raise EngineFailure(event.reason, event.status)
    return event


def _read_end(errors: IO[bytes]) -> str:
    """Read the end of what a process wrote, and close the file."""
    with errors:
        errors.seek(max(0, errors.seek(0, os.SEEK_END) - _LAST_BYTES))
        return errors.read().decode("utf-8", errors="replace").strip()
