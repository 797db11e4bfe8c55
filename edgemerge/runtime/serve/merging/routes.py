"""The routes of the Models tab; `gate.Gate` lets nobody change anything without a key."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request

from edgemerge.errors import EdgemergeError
from edgemerge.runtime.serve.errors import Refusal
from edgemerge.runtime.serve.merging.choices import (
    MergeRequest,
    PlanRequest,
    describe_methods,
    read_request,
)
from edgemerge.runtime.serve.merging.shown import Shown
from edgemerge.runtime.serve.merging.workshop import Workshop
from edgemerge.runtime.serve.requests import ADMIN, Body
from edgemerge.runtime.serve.routes import Routes

__all__ = ["add_merging"]

T = TypeVar("T")


class ModelRequest(Body):
    """A model of the folder, by its id."""

    model: str


class CompareRequest(ModelRequest):
    """A model, and files of questions by their keys."""

    questions: list[str]


class CancelRequest(Body):
    """A job, by its number."""

    job: int


def add_merging(routes: Routes, shown: Shown, workshop: Workshop | None, *, has_key: bool) -> None:
    """Add the routes; without a folder there is nothing to change.

    Parameters
    ----------
    routes : Routes
        What gets them.
    shown : Shown
        What tells how everything is.
    workshop : Workshop or None
        What works on the device's folder, where there is one.
    has_key : bool
        Whether clients need a key, without which nothing may be changed.
    """

    @routes.get(f"{ADMIN}/models")
    async def models(_request: Request) -> dict[str, Any]:
        told = await _plainly(shown.read(), workshop)
        return {"has_key": has_key, **told, "job": _job(workshop)}

    @routes.get(f"{ADMIN}/job")
    async def job(_request: Request) -> dict[str, Any]:
        return {"job": _job(workshop)}

    @routes.get(f"{ADMIN}/methods")
    async def methods(_request: Request) -> dict[str, Any]:
        return describe_methods()

    if workshop is not None:
        _add_changes(routes, workshop)


def _job(workshop: Workshop | None) -> dict[str, Any] | None:
    last = None if workshop is None else workshop.jobs.last
    return None if last is None else last.as_json()


async def _plainly(work: Awaitable[T], workshop: Workshop | None) -> T:
    """Say what is wrong with the folder or a file of it."""
    try:
        return await work
    except Refusal:
        raise
    except (EdgemergeError, OSError) as error:
        if workshop is None:
            raise
        raise Refusal(409, workshop.explain(error), code="not_possible") from None


def _add_changes(routes: Routes, workshop: Workshop) -> None:
    plainly = partial(_plainly, workshop=workshop)

    @routes.post(f"{ADMIN}/plan", PlanRequest)
    async def plan(body: PlanRequest) -> dict[str, Any]:
        return await plainly(workshop.plan(body))

    @routes.post(f"{ADMIN}/merge", MergeRequest)
    async def merge(body: MergeRequest) -> dict[str, Any]:
        async def begin() -> dict[str, Any]:
            workshop.check_name(body.name)
            wanted = await asyncio.to_thread(read_request, body, workshop.offers)
            return workshop.merge(body, wanted).as_json()

        return {"job": await plainly(begin())}

    @routes.post(f"{ADMIN}/compare", CompareRequest)
    async def compare(body: CompareRequest) -> dict[str, Any]:
        async def begin() -> dict[str, Any]:
            return workshop.compare(body.model, body.questions).as_json()

        return {"job": await plainly(begin())}

    @routes.post(f"{ADMIN}/cancel", CancelRequest)
    async def cancel(body: CancelRequest) -> dict[str, Any]:
        return {"job": (await workshop.jobs.cancel(body.job)).as_json()}

    @routes.post(f"{ADMIN}/promote", ModelRequest)
    async def promote(body: ModelRequest) -> dict[str, Any]:
        return await plainly(workshop.promote(body.model))

    @routes.post(f"{ADMIN}/rollback", Body)
    async def roll_back(_body: Body) -> dict[str, Any]:
        return await plainly(workshop.roll_back())
