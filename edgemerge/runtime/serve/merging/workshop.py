"""What the Models tab does: plans, merges and compares as children, promotes and rolls back.

Promoted models, records and the log are those of the device's folder (`edgemerge.site.folder`), so that the
page and the commands do the same to the same files.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from edgemerge.errors import EdgemergeError, OutputError
from edgemerge.planning.plan import DEFAULT_MEMORY
from edgemerge.runtime.serve.errors import BUSY, SERVER, Refusal
from edgemerge.runtime.serve.merging.adopting import adopt_start
from edgemerge.runtime.serve.merging.child import digest_files, run_command
from edgemerge.runtime.serve.merging.choices import MergeRequest, PlanRequest, Wanted, read_request
from edgemerge.runtime.serve.merging.compared import compare_tasks, name_tasks, scores_of
from edgemerge.runtime.serve.merging.job import Job, Jobs
from edgemerge.runtime.serve.merging.offers import Offers
from edgemerge.runtime.serve.merging.pace import estimate_seconds
from edgemerge.runtime.serve.merging.room import free_room, reserved
from edgemerge.runtime.serve.models import read_model_file
from edgemerge.runtime.serve.reload import Reloader
from edgemerge.runtime.serve.store import ModelStore
from edgemerge.site.folder import SiteFolder
from edgemerge.site.record import ID_DIGITS, ModelRecord, Part, now
from edgemerge.sizes import format_size

__all__ = ["Workshop"]

_WORK = "page-"  # what folders of the page's merges in `work` begin with
_MAX_QUESTIONS = 16  # files for one comparison
# what the page shows of `plan --json`
_PLANNED = "file_type read_bytes written_bytes passes needed_bytes budget_bytes notes"


class Workshop:
    """Works on the models of one device's folder; all of it runs in one event loop.

    Parameters
    ----------
    site : SiteFolder
        The folder; it is made where it is missing.
    folders : sequence of Path
        Others whose files may be merged and asked.
    models : ModelStore
        What is served; its default is the site's model.
    reloader : Reloader
        What lets another file answer.

    Raises
    ------
    OutputError
        The folder cannot be made.
    """

    def __init__(
        self, site: SiteFolder, folders: Sequence[Path], models: ModelStore, reloader: Reloader
    ) -> None:
        self.site = site
        self.models = models
        self.name = models.default
        self.offers = Offers([*folders, site.inputs, site.models])
        self.jobs = Jobs(self.explain)
        self._reloader = reloader
        self._planning = asyncio.Lock()
        self._switches: set[asyncio.Task[dict[str, Any]]] = set()
        site.make()

    def tidy(self) -> None:
        """Remove what a server that was ended at once left in the making; another one may be at work."""
        if any(self.site.work.glob(f"{_WORK}*")):
            with suppress(OutputError), self.site.locked():
                for left in self.site.work.glob(f"{_WORK}*"):
                    shutil.rmtree(left, ignore_errors=True)

    async def close(self) -> None:
        """End what runs; a switch that has begun is finished."""
        await self.jobs.close()
        await asyncio.gather(*self._switches, return_exceptions=True)

    def explain(self, error: Exception) -> str:
        """Say what went wrong, files by their names alone."""
        if not isinstance(error, EdgemergeError | OSError):
            return "the server failed on this; its log says why"
        sentence = str(error)
        for folder in sorted(map(str, (*self.offers.folders, self.site.path)), key=len)[::-1]:
            sentence = sentence.replace(f"{folder}/", "")
        return sentence

    # -- merging

    async def plan(self, asked: PlanRequest) -> dict[str, Any]:
        """Tell what a merge would read, write and need, and how long it would take.

        Raises
        ------
        Refusal
            It is not possible, or a job runs.
        """
        self.jobs.check_free()
        wanted = await asyncio.to_thread(read_request, asked, self.offers)
        async with self._planning:
            with tempfile.TemporaryDirectory(prefix="edgemerge-") as folder:
                options = _write_recipe(wanted, Path(folder), self._merge_memory())
                try:
                    plan = await run_command(["plan", *options])
                except EdgemergeError as error:
                    raise Refusal(400, self.explain(error), code="not_possible") from None
            pace = await asyncio.to_thread(estimate_seconds, self.site, wanted, plan["read_bytes"])
        free = shutil.disk_usage(self.site.path).free
        return {key: plan[key] for key in _PLANNED.split()} | {"free_bytes": free} | pace

    def merge(self, asked: MergeRequest, wanted: Wanted) -> Job:
        """Begin a merge.

        Raises
        ------
        Refusal
            409: a job runs.
        """
        return self.jobs.start("merge", asked.name, partial(self._merge, asked.name, wanted))

    async def _merge(self, name: str, wanted: Wanted, job: Job) -> dict[str, Any]:
        with self.site.locked(), self._folder() as folder:
            made = folder / f"{name}.gguf"
            memory = self._merge_memory()
            options = _write_recipe(wanted, folder, memory)
            with reserved(self.models, memory):
                report = await run_command(["merge", *options, "-o", str(made)], job.look)
                # without what the first merge of a machine compiles
                report["seconds"] = job.counted
                job.enter("checksums of what it was made of")
                parts = await _list_parts(wanted)
            record = _make_record(name, wanted, report, parts)
            is_known = self.site.has_model(record.id)
            if not is_known:
                adding = asyncio.create_task(asyncio.to_thread(self._add, made, record, name))
                with suppress(asyncio.CancelledError):  # too late: it is here
                    await asyncio.shield(adding)
                await adding
        kept = ("seconds", "out_bytes", "read_bytes", "peak_rss_bytes", "notes")
        told = {key: report[key] for key in kept}
        return {"model": record.id, "is_known": is_known, **told}

    def _add(self, made: Path, record: ModelRecord, name: str) -> None:
        self.site.add(made, record)
        self.site.append_log({"event": "merged", "id": record.id, "name": name})

    def _merge_memory(self) -> int:
        """Bytes that a merge gets; where they do not suffice, it says how many do."""
        return max(1 << 20, min(DEFAULT_MEMORY, free_room(self.models)))

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        """Make a folder for files in the making, which go with it."""
        folder = Path(tempfile.mkdtemp(prefix=_WORK, dir=self.site.work))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    # -- comparing

    def compare(self, model: str, questions: Sequence[str]) -> Job:
        """Begin to ask a model and the one that serves the same questions.

        Raises
        ------
        Refusal
            404 for what is not here, 409 where a job runs or it is the same model.
        """
        record = self.record(model)
        if model == self.site.current_id():
            raise Refusal(409, "this model serves already; compare another one with it")
        if not 0 < len(questions) <= _MAX_QUESTIONS:
            raise Refusal(400, f"choose 1 to {_MAX_QUESTIONS} files of questions")
        files = [self.offers.take(key, ("questions",)) for key in dict.fromkeys(questions)]
        title = f"{shown_name(record)} and the model that serves"
        tasks = name_tasks(files)
        return self.jobs.start("compare", title, partial(self._compare, model, tasks))

    async def _compare(self, model: str, tasks: dict[str, Path], job: Job) -> dict[str, Any]:
        first = self.models.resolve(self.name).path.resolve()
        second = self.site.model_path(model).resolve()
        # noted now: an update may promote another one meanwhile
        base = first.stem if first.parent == self.site.models.resolve() else None
        other, file = [
            await asyncio.to_thread(read_model_file, path, n_sequences=1)
            for path in (first, second)
        ]
        room = free_room(self.models)
        if file.need > room:
            raise Refusal(
                503,
                f"asking it takes {format_size(file.need)}, and {format_size(room)} are free beside "
                "the server: start it with a smaller --memory",
                kind=SERVER,
            )
        threads = max(1, len(os.sched_getaffinity(0)) // 2)
        n_ctx = min(other.n_ctx, file.n_ctx)
        options = ["--ctx", str(n_ctx), "--threads", str(threads)]
        for name, path in tasks.items():
            options.append(f"--task={name}={path}")
        with reserved(self.models, file.need):
            document = await run_command(["eval", str(first), str(second), *options], job.look)
        rows = compare_tasks(document, str(first), str(second))
        told: dict[str, Any] = {"model": model, "tasks": rows, "note": ""}
        try:
            await asyncio.to_thread(self._note_scores, base, model, rows)
        except (EdgemergeError, OSError) as error:  # the answers are worth more than their place
            told["note"] = f"the log does not have this: {self.explain(error)}"
        return told

    def _note_scores(self, base: str | None, model: str, rows: list[dict[str, Any]]) -> None:
        with self.site.locked():
            for which, name in enumerate((base, model)):
                if name is not None:
                    record = self.site.record(name)
                    scores = {**record.scores, **scores_of(rows, which)}
                    self.site.write_record(replace(record, scores=scores))
            event = {"event": "compared", "id": model, "with": base, "tasks": rows}
            self.site.append_log(event)

    # -- which one serves

    async def promote(self, model: str) -> dict[str, Any]:
        """Let a model answer, after it was loaded beside the old one and asked.

        Raises
        ------
        Refusal
            404 where it is not here; 409 where it is not taken, or another process changes the folder.
        """
        return await self._finish(self._promote(model))

    async def roll_back(self) -> dict[str, Any]:
        """Let the model before answer again.

        Raises
        ------
        Refusal
            409 where there is none, or as of `promote`.
        """
        return await self._finish(self._roll_back())

    async def _finish(self, switch: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
        """Go on when the client leaves: else the folder and the server could tell of different models."""
        task = asyncio.create_task(switch)
        self._switches.add(task)
        task.add_done_callback(self._switches.discard)
        return await asyncio.shield(task)

    async def _promote(self, model: str) -> dict[str, Any]:
        record = self.record(model)
        reason = f"chosen on the page{_told_scores(record)}"
        with self._locked():
            if self.site.current_id() is None:
                start = self.models.resolve(self.name).path
                await adopt_start(self.site, start, self._folder)
            return await self._switch(model, partial(self.site.promote, model, reason), asks=True)

    async def _roll_back(self) -> dict[str, Any]:
        with self._locked():
            before = self.site.previous()
            if before is None:
                raise Refusal(409, "there is no earlier model to go back to")
            reason = "taken back on the page"
            return await self._switch(before, partial(self.site.roll_back, reason), asks=False)

    async def _switch(
        self, model: str, note: Callable[[], object], *, asks: bool
    ) -> dict[str, Any]:
        """Load the file of an id; `note` writes the switch down when it has loaded, and answers well."""
        path, then = self.site.model_path(model), self.site.current_path
        return await self._reloader.replace(self.name, path, note, then=then, asks=asks)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.jobs.check_free()
        try:
            with self.site.locked():
                yield
        except (EdgemergeError, OSError) as error:
            if isinstance(error, Refusal):
                raise
            raise Refusal(409, self.explain(error), kind=BUSY) from None

    # -- records

    def record(self, model: str) -> ModelRecord:
        """Return the record of a model that is here.

        Raises
        ------
        Refusal
            404: there is none.
        """
        for one in self.site.records():
            if one.id == model and self.site.has_model(model):
                return one
        raise Refusal(404, f"there is no model {model[:100]!r} here: reload the list")

    def names(self) -> dict[str, str]:
        """Names that people gave to models, by id."""
        return {one.id: shown_name(one) for one in self.site.records()}

    def check_name(self, name: str) -> None:
        """Do nothing if no model that is here has the name.

        Raises
        ------
        Refusal
            409: one has.
        """
        for one in self.site.records():
            if shown_name(one) == name and self.site.has_model(one.id):
                raise Refusal(409, f"a model is called {name!r} already; choose another name")


def shown_name(record: ModelRecord) -> str:
    """Name of a model for people: the one that it was given, else its id."""
    return str(record.settings.get("name") or record.id)


def _write_recipe(wanted: Wanted, folder: Path, memory: int) -> list[str]:
    """Write the recipe, and give the arguments of `plan` and `merge`."""
    path = folder / "recipe.yml"
    path.write_text(json.dumps(wanted.recipe()), encoding="utf-8")  # JSON is YAML
    return [str(path), "--memory", str(memory), *wanted.options()]


async def _list_parts(wanted: Wanted) -> tuple[Part, ...]:
    offers = [] if wanted.base is None else [(wanted.base, "base")]
    offers += [
        (offer, "delta" if offer.kind == "delta" else "expert") for offer, _ in wanted.models
    ]
    digests = await digest_files([offer.path for offer, _ in offers])
    return tuple(
        Part(offer.name, "", digest, role)
        for (offer, role), digest in zip(offers, digests, strict=True)
    )


def _make_record(
    name: str, wanted: Wanted, report: dict[str, Any], parts: tuple[Part, ...]
) -> ModelRecord:
    number = report["sha256"][:ID_DIGITS]
    measured = {"seconds": report["seconds"], "read_bytes": report["read_bytes"]}
    return ModelRecord(
        id=number,
        file=f"models/{number}.gguf",
        sha256=report["sha256"],
        bytes=report["out_bytes"],
        made=now(),
        made_of=parts,
        method=wanted.method.name,
        settings={"name": name, **wanted.settings(), **measured},
    )


def _told_scores(record: ModelRecord) -> str:
    """Say a model's scores, in brackets."""
    told = [f"{task} {score.right} of {score.n}" for task, score in record.scores.items()]
    return f" ({', '.join(told)})" if told else ""
