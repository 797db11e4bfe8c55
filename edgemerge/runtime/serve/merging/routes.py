"""The routes of the Models tab; `gate.Gate` lets nobody change anything without a key."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from functools import partial
from typing import Any, TypeVar

from fastapi import APIRouter

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


def add_merging(
    router: APIRouter, shown: Shown, workshop: Workshop | None, *, has_key: bool
) -> None:
    """Add the routes; without a folder there is nothing to change.

    Parameters
    ----------
    router : APIRouter
        What gets them.
    shown : Shown
        What tells how everything is.
    workshop : Workshop or None
        What works on the device's folder, where there is one.
    has_key : bool
        Whether clients need a key, without which nothing may be changed.
    """

    @router.get(f"{ADMIN}/models")
    async def models() -> dict[str, Any]:
        told = await _plainly(shown.read(), workshop)
        return {"has_key": has_key, **told, "job": _job(workshop)}

    @router.get(f"{ADMIN}/job")
    async def job() -> dict[str, Any]:
        return {"job": _job(workshop)}

    @router.get(f"{ADMIN}/methods")
    async def methods() -> dict[str, Any]:
        return describe_methods()

    if workshop is not None:
        _add_changes(router, workshop)


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


def _add_changes(router: APIRouter, workshop: Workshop) -> None:
    plainly = partial(_plainly, workshop=workshop)

    @router.post(f"{ADMIN}/plan")
    async def plan(body: PlanRequest) -> dict[str, Any]:
        return await plainly(workshop.plan(body))

    @router.post(f"{ADMIN}/merge")
    async def merge(body: MergeRequest) -> dict[str, Any]:
        async def begin() -> dict[str, Any]:
            workshop.check_name(body.name)
            wanted = await asyncio.to_thread(read_request, body, workshop.offers)
            return workshop.merge(body, wanted).as_json()

        return {"job": await plainly(begin())}

    @router.post(f"{ADMIN}/compare")
    async def compare(body: CompareRequest) -> dict[str, Any]:
        async def begin() -> dict[str, Any]:
            return workshop.compare(body.model, body.questions).as_json()

        return {"job": await plainly(begin())}

    @router.post(f"{ADMIN}/cancel")
    async def cancel(body: CancelRequest) -> dict[str, Any]:
        return {"job": (await workshop.jobs.cancel(body.job)).as_json()}

    @router.post(f"{ADMIN}/promote")
    async def promote(body: ModelRequest) -> dict[str, Any]:
        return await plainly(workshop.promote(body.model))

    @router.post(f"{ADMIN}/rollback")
    async def roll_back() -> dict[str, Any]:
        return await plainly(workshop.roll_back())
