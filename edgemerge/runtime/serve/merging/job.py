"""The one piece of work that runs beside the server; how it is, and how it ended, outlives a page."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from edgemerge.errors import EdgemergeError
from edgemerge.runtime.serve.errors import BUSY, Refusal

__all__ = ["Job", "Jobs"]

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Job:
    """A merge or a comparison.

    Attributes
    ----------
    id : int
        Its number.
    kind, title : str
        merge or compare, and what it makes or asks.
    state : str
        running, done, failed or cancelled.
    stage : str
        What it is at.
    done, total, unit : int, int, str or None
        How far it is; without a unit, in bytes.
    sentence : str
        Why it failed.
    result : dict or None
        What it came to.
    """

    id: int
    kind: str
    title: str
    state: str = "running"
    stage: str = "preparing"
    done: int = 0
    total: int = 0
    unit: str | None = None
    sentence: str = ""
    result: dict[str, Any] | None = None
    began: float = field(default_factory=time.monotonic)
    looked: float | None = None
    ended: float | None = None

    def look(self, line: dict[str, Any]) -> None:
        """Take a line of a command's progress."""
        self.looked = self.looked or time.monotonic()
        self.stage = str(line["label"])
        self.done, self.total, self.unit = line["done"], line["total"], line["unit"]

    def enter(self, stage: str) -> None:
        """Begin a stage of which nothing is counted."""
        self.stage, self.done, self.total, self.unit = stage, 0, 0, None

    def end(self) -> None:
        """Note the end; what came to none by itself was cancelled, perhaps before it began."""
        self.ended = time.monotonic()
        if self.state == "running":
            self.state = "cancelled"

    @property
    def counted(self) -> float:
        """Seconds since the first line of progress."""
        now = time.monotonic()
        return round(now - (self.looked or now), 3)

    def as_json(self) -> dict[str, Any]:
        """Tell the page."""
        return {
            "id": self.id,
            "kind": self.kind,
            "title": self.title,
            "state": self.state,
            "stage": self.stage,
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "sentence": self.sentence,
            "result": self.result,
            "seconds": round((self.ended or time.monotonic()) - self.began, 1),
        }


class Jobs:
    """Runs one job at a time, and remembers the last.

    Parameters
    ----------
    explain : function
        Makes the sentence for the page of what a job failed with.
    """

    def __init__(self, explain: Callable[[Exception], str]) -> None:
        self.last: Job | None = None
        self._explain = explain
        self._task: asyncio.Task[None] | None = None
        self._ids = count(1)

    def check_free(self) -> None:
        """Do nothing if none runs.

        Raises
        ------
        Refusal
            409: one does.
        """
        if self._task is not None and not self._task.done():
            assert self.last is not None
            raise Refusal(
                409,
                f"{self.last.title} is still at work: wait for its end, or cancel it",
                kind=BUSY,
                code="job_running",
            )

    def start(self, kind: str, title: str, work: Callable[[Job], Awaitable[dict[str, Any]]]) -> Job:
        """Begin a job.

        Parameters
        ----------
        kind, title : str
            As of `Job`.
        work : function
            Does it, and returns its result.

        Raises
        ------
        Refusal
            409: another one runs.
        """
        self.check_free()
        job = self.last = Job(next(self._ids), kind, title)
        self._task = asyncio.create_task(self._run(job, work))
        self._task.add_done_callback(lambda _task: job.end())
        return job

    async def cancel(self, number: int) -> Job:
        """End a job, and wait until nothing of it is left at work.

        Raises
        ------
        Refusal
            409: it does not run any more.
        """
        job, task = self.last, self._task
        if job is None or task is None or job.id != number or task.done():
            raise Refusal(409, "it has ended already", code="job_ended")
        await _end(task)
        return job

    async def close(self) -> None:
        """End the job that runs, if one does."""
        if self._task is not None:
            await _end(self._task)

    async def _run(self, job: Job, work: Callable[[Job], Awaitable[dict[str, Any]]]) -> None:
        try:
            job.result = await work(job)
            job.state = "done"
        except Exception as error:
            job.state, job.sentence = "failed", self._explain(error)
            if isinstance(error, EdgemergeError):
                log.error("%s", error)
            else:
                log.error("%s failed", job.title, exc_info=error)


async def _end(task: asyncio.Task[None]) -> None:
    """Cancel a task once, for a second time would break off what it does to end its child."""
    if task.cancelling() == 0:
        task.cancel()
    await asyncio.wait((task,))
