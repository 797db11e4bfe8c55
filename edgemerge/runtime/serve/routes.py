"""Routes whose bodies are checked by pydantic and whose answers are JSON.

This is what the server wants of FastAPI, whose import alone takes 10 MiB and most of a start.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from edgemerge.runtime.serve.errors import Refusal, wrong_field

__all__ = ["Routes"]

Sent = TypeVar("Sent", bound=BaseModel)
Asked = Callable[[Request], Awaitable[Any]]


class Routes:
    """What answers, by path.

    Attributes
    ----------
    list : list of Route
        All that were added.
    """

    def __init__(self) -> None:
        self.list: list[Route] = []

    def get(self, path: str) -> Callable[[Asked], Asked]:
        """Answer GET of a path (Starlette's pattern) by what a function of the request returns."""

        def add(answer: Asked) -> Asked:
            self._add(path, "GET", answer)
            return answer

        return add

    def post(
        self, path: str, form: type[Sent]
    ) -> Callable[[Callable[[Sent], Awaitable[Any]]], Callable[[Sent], Awaitable[Any]]]:
        """Answer POST of a path by what a function of the checked body returns.

        Parameters
        ----------
        path : str
            Starlette's pattern.
        form : subclass of pydantic.BaseModel
            What the body has to be, whatever the client calls its type; else the client gets a 400.
        """

        def add(answer: Callable[[Sent], Awaitable[Any]]) -> Callable[[Sent], Awaitable[Any]]:
            async def read_and_answer(request: Request) -> Any:
                return await answer(_read(await request.body(), form))

            self._add(path, "POST", read_and_answer)
            return answer

        return add

    def _add(self, path: str, method: str, answer: Asked) -> None:
        async def respond(request: Request) -> Response:
            found = await answer(request)
            return found if isinstance(found, Response) else JSONResponse(found)

        route = Route(path, respond)
        route.methods = {method}
        self.list.append(route)


def _read(body: bytes, form: type[Sent]) -> Sent:
    """Check a body.

    Raises
    ------
    Refusal
        400: it is no JSON, or not of this form.
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise Refusal(400, "the body is no JSON") from None
    try:
        return form.model_validate(document, from_attributes=True)
    except ValidationError as error:
        raise Refusal(400, wrong_field(error.errors())) from None
