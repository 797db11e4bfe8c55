"""All parts of a server, put together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

from starlette.applications import Starlette

from edgemerge.machine.process import read_process
from edgemerge.runtime.doctor.fit import MAX_LAYERS
from edgemerge.runtime.engine.options import EngineOptions
from edgemerge.runtime.engine.process import ModelProcess
from edgemerge.runtime.serve.app import ROUTES, make_app
from edgemerge.runtime.serve.gate import Access, Gate
from edgemerge.runtime.serve.hashed import HashedLoader
from edgemerge.runtime.serve.loaded import Loaded
from edgemerge.runtime.serve.merging.shown import Shown
from edgemerge.runtime.serve.merging.workshop import Workshop
from edgemerge.runtime.serve.models import (
    DEFAULT_SEQUENCES,
    ModelFile,
    read_model_file,
    usable_memory,
)
from edgemerge.runtime.serve.options import ServeOptions, Started
from edgemerge.runtime.serve.queue import Queue
from edgemerge.runtime.serve.reload import Reloader
from edgemerge.runtime.serve.request_log import RequestLog
from edgemerge.runtime.serve.signed import SignedLoader
from edgemerge.runtime.serve.status import Status
from edgemerge.runtime.serve.store import ModelStore
from edgemerge.runtime.serve.turns import Turns
from edgemerge.site.folder import SiteFolder

__all__ = ["Service"]


class Service:
    """What answers requests, and what happens to it (`http.Handlers`).

    Parameters
    ----------
    options : ServeOptions
        What to serve.

    Raises
    ------
    RecipeError, FormatError, RuntimeFailure, BudgetError, VerificationError
        As of `serve`.
    """

    def __init__(self, options: ServeOptions) -> None:
        self._options = options
        load: Callable[[ModelFile], Awaitable[Loaded]] = self._load
        if options.log is not None:
            load = HashedLoader(load)
        files = [self._read(name, path) for name, path in options.models]
        if options.public_key is not None:
            loras = (lora.path for lora in options.loras)
            load = signed = SignedLoader(load, options.public_key, loras)
            for file in files[1:]:  # the first is loaded right away
                signed.check(file.path)
        floor = read_process().rss
        budget = options.memory or usable_memory(floor)
        self._room = (budget - floor) // len(files)
        files = [file.within(self._room) for file in files]
        self.models = ModelStore(files, load, self._read_again, budget=budget, floor=floor)
        self._queue = Queue(self.models, options.queue, options.queue_seconds)
        self.models.changed = self._queue.advance
        logs_prompts = options.log is not None and options.log_prompts
        self._status = Status(self.models, self._queue, logs_prompts=logs_prompts)
        self._reloader = Reloader(self.models)
        self._workshop = self._open_workshop()
        self._log: RequestLog | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def open_log(self, path: Path) -> None:
        """Write requests down.

        Raises
        ------
        OutputError
            The file cannot be written.
        """
        self._log = RequestLog(path, with_prompts=self._options.log_prompts)

    def close_log(self) -> None:
        """Close the log, if there is one."""
        if self._log is not None:
            self._log.close()

    def routes(self) -> Starlette:
        """Make the app; `app` puts the gate in front of it."""
        limits = self._options.limits
        turns = Turns(self.models, self._queue, self._status, limits)
        shown = Shown(
            self.models,
            checks_signatures=self._options.public_key is not None,
            workshop=self._workshop,
        )
        has_key = self._options.key is not None
        return make_app(turns, self._reloader, shown, self._workshop, has_key=has_key)

    def app(self, hosts: frozenset[str]) -> Gate:
        """Make what answers; `hosts` are the names that it may be asked for, none for any."""
        options = self._options
        return Gate(
            self.routes(),
            access=Access(options.key, hosts, options.open_metrics),
            limits=options.limits,
            status=self._status,
            routes=ROUTES,
            request_log=self._log,
        )

    def describe(self, url: str) -> Started:
        """Say what is served."""
        has_key = self._options.key is not None
        return Started(url, tuple(self.models), self.models.budget, has_key)

    # -- what happens to the server

    async def prepare(self) -> None:
        """Tidy the device's folder, and load the default model.

        Raises
        ------
        RuntimeFailure, FormatError, VerificationError
            It does not load, or is not signed.
        """
        if self._workshop is not None:
            await asyncio.to_thread(self._workshop.tidy)
        self.models.adopt(await self.models.start(self.models.resolve(None)))
        self._do(self.models.watch(self._options.idle_seconds))

    def refuse(self) -> None:
        """Let no request begin any more."""
        self._queue.close()

    def cut(self) -> None:
        """End all answers that run."""
        for run in tuple(self._status.runs):
            run.shut_down()

    def reload(self) -> None:
        """Read the models' files again."""
        self._do(self._reloader.reload_all())

    async def finish(self) -> None:
        """End all processes."""
        if self._workshop is not None:
            await self._workshop.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.models.close()

    def _do(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _open_workshop(self) -> Workshop | None:
        options = self._options
        if options.site is None:
            return None
        return Workshop(
            SiteFolder(options.site), options.merge_folders, self.models, self._reloader
        )

    # -- models

    async def _load(self, file: ModelFile) -> Loaded:
        options = self._options
        process = ModelProcess(
            EngineOptions(
                file.path,
                n_ctx=file.n_cache,
                n_longest=file.n_ctx,
                n_sequences=file.n_sequences,
                n_threads=options.n_threads,
                n_gpu_layers=options.n_gpu_layers,
                loras=options.loras,
                kv_type=options.kv_type,
                memory=file.need,
                rpc=options.rpc,
            )
        )
        facts = await process.start()
        return Loaded(replace(file, n_ctx=facts.n_ctx), process, facts)

    def _read(self, name: str, path: Path) -> ModelFile:
        options = self._options
        return read_model_file(
            path,
            options.n_ctx,
            name=name,
            n_sequences=options.n_sequences or DEFAULT_SEQUENCES,
            kv_type=options.kv_type,
            rpc_layers=_rpc_layers(options),
        )

    async def _read_again(self, old: ModelFile) -> ModelFile:
        new = await asyncio.to_thread(self._read, old.name, old.path)
        return new.within(self._room)


def _rpc_layers(options: ServeOptions) -> int:
    """Layers that rpc workers compute; more than there are stand for all."""
    if not options.rpc:
        return 0
    return MAX_LAYERS if options.n_gpu_layers is None else options.n_gpu_layers
