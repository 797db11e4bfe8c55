"""What the server says when it does not answer, in the form that OpenAI's clients know."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from edgemerge.errors import BudgetError, EdgemergeError
from edgemerge.runtime.engine.process import EngineFailure

__all__ = ["BUSY", "INVALID", "SERVER", "TOO_LARGE"]
__all__ += ["NO_ROOM_BESIDE_KEPT", "NO_ROOM_FOR_BOTH", "NO_ROOM_NOW"]
__all__ += ["Refusal", "cannot_load", "explain", "stopping", "unavailable", "wrong_field"]

log = logging.getLogger(__name__)

INVALID, BUSY, SERVER = "invalid_request_error", "server_busy", "server_error"
NO_ROOM_NOW = "there is no room in memory for the model while others answer"
NO_ROOM_FOR_BOTH = (
    "there is no room in memory for the new model beside the one that it replaces; start the server with "
    "more --memory"
)
NO_ROOM_BESIDE_KEPT = (
    "there is no room in memory for the model beside another one, whose new file a reload has refused; put "
    "a better file there"
)
TOO_LARGE = (
    "is too large for the server's memory; start the server with more --memory or a smaller --ctx"
)
# what the engine says (`prompts`)
_TOO_LONG = re.compile(r" has (\d+) tokens(?: with the query)? and the context is (\d+)")
_MAX_MESSAGE = 500  # characters; a wrong request may be large and comes back in its message


class Refusal(EdgemergeError):
    """A request that gets no answer.

    Parameters
    ----------
    status : int
        Of HTTP.
    message : str
        One sentence for the client; it names no file of this machine.
    kind : str
        OpenAI's `type`.
    code : str, optional
        OpenAI's `code`.
    retry_after : int, optional
        Seconds after which another try makes sense; without it OpenAI's client does not try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        self.status = status
        self.kind = kind
        self.code = code
        self.retry_after = retry_after
        super().__init__(message)

    @property
    def content(self) -> dict[str, Any]:
        """Body of the answer."""
        message = str(self)[:_MAX_MESSAGE]
        error = {"message": message, "type": self.kind, "param": None, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer, lower case, beside type and length."""
        headers = {"cache-control": "no-store"}
        if self.retry_after is not None:
            headers["retry-after"] = str(self.retry_after)
        else:
            headers["x-should-retry"] = "false"  # the openai client would repeat 408, 409 and 5xx
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers

    def event(self) -> str:
        """Write the server-sent event that ends a stream which had begun."""
        return json.dumps(self.content)


def stopping() -> Refusal:
    """Refuse because the server is about to end; another may take its place."""
    return Refusal(503, "the server is stopping", kind=BUSY, retry_after=5)


def unavailable(sentence: str) -> Refusal:
    """Refuse because a model's file is not as it should be; somebody has to see to that."""
    return Refusal(503, sentence, kind=SERVER, code="model_unavailable", retry_after=30)


def cannot_load(name: str, error: EdgemergeError) -> Refusal:
    """Say that a model does not load; the log gets the error, which names files."""
    code = "model_unavailable"
    if isinstance(error, BudgetError):
        return Refusal(503, f"the file of the model {name!r} {TOO_LARGE}", kind=SERVER, code=code)
    sentence = f"the model {name!r} cannot be loaded; the server's log says why"
    return Refusal(500, sentence, kind=SERVER, code=code)


def explain(error: BaseException) -> Refusal:
    """Say what an exception means to the client; the log gets what it must not see.

    Parameters
    ----------
    error : exception
        Whatever came out of a route or of a model's process.
    """
    from starlette.exceptions import HTTPException

    if isinstance(error, Refusal):
        return error
    if isinstance(error, HTTPException):
        return Refusal(error.status_code, str(error.detail))
    if isinstance(error, EngineFailure):
        return _explain_engine(error)
    log.error("request failed", exc_info=error)
    return Refusal(500, "the server failed on this request; its log says why", kind=SERVER)


def _explain_engine(failure: EngineFailure) -> Refusal:
    reason = str(failure)
    if match := _TOO_LONG.search(reason):
        return Refusal(
            400,
            f"This model's maximum context length is {match[2]} tokens, and the request has "
            f"{match[1]}; please shorten it.",
            code="context_length_exceeded",
        )
    if failure.status == 503:  # its process has ended: the next request starts it again
        return Refusal(503, reason, kind=SERVER, code="model_unavailable", retry_after=1)
    if failure.status >= 500:
        log.error("%s", reason)
    return Refusal(failure.status, reason, kind=INVALID if failure.status < 500 else SERVER)


def wrong_field(problems: Sequence[Mapping[str, Any]]) -> str:
    """Make one sentence of pydantic's complaints, as `ValidationError.errors` gives them.

    Where a field may be one of several types, each type has its own: those of the type that came
    closest tell what is meant.
    """
    by_type: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for problem in problems:
        types = tuple(str(part) for part in problem["loc"] if not _is_field(part))
        by_type.setdefault(types, []).append(problem)
    closest = min(by_type.values(), key=len)[0]
    where = ".".join(str(part) for part in closest["loc"] if _is_field(part))
    message = str(closest["msg"]).removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _is_field(part: str | int) -> bool:
    """Whether a part of a place is a name or an index, and not a type that was tried."""
    return isinstance(part, int) or (part.islower() and part != "str" and "[" not in part)
