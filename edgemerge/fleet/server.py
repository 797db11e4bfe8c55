"""The device's `edgemerge serve`, as an update sees it: reload, a question, and how its models are."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemerge.errors import RuntimeFailure
from edgemerge.fleet.site_file import ServerPlace
from edgemerge.runtime.model_files import find_fingerprint
from edgemerge.runtime.serve.key import check_characters
from edgemerge.runtime.smoke import MAX_TOKENS
from edgemerge.suggestions import suggest

__all__ = ["Look", "Reply", "Server", "ServerRefusal", "ServerSilence", "ServerUnheard"]

# As in edgemerge.runtime.serve.requests, whose import needs the extra of the server.
RELOAD, CHAT, COMPLETIONS, HEALTH = (
    "/admin/reload",
    "/v1/chat/completions",
    "/v1/completions",
    "/health",
)
LOOK_SECONDS = 60.0
ASK_SECONDS = 240.0  # a slow board writes a token in two seconds
RELOAD_SECONDS = 600.0  # a large model on a slow card
ROOM_SECONDS = 60.0  # in which a server that is busy is told again to reload
ROOM_BETWEEN = 5.0
MAX_BYTES = 1 << 20
BUSY = (429, 503)
PROXY = (502, 503, 504)  # a proxy reaches no server, or waits no longer; uvicorn says 503 itself
NOT_OURS = (401, 403, 404)  # of a wrong key, of another server, of a model that it does not have


class ServerSilence(RuntimeFailure):
    """Nothing answers at the server's address."""


class ServerUnheard(ServerSilence):
    """What answers is not the server, but mostly a proxy that does not reach it; `status` is HTTP's."""

    def __init__(self, message: str, status: int) -> None:
        self.status = status
        super().__init__(message)

    @property
    def may_be_full(self) -> bool:
        """Whether it may be the server itself, with too many connections."""
        return self.status == 503


class ServerRefusal(RuntimeFailure):
    """The server answers with an error; `status` is HTTP's number, `code` and `kind` the server's words."""

    def __init__(self, message: str, status: int, code: str, kind: str = "") -> None:
        self.status, self.code, self.kind = status, code, kind
        super().__init__(message)

    @property
    def is_busy(self) -> bool:
        """Whether it only has too much to do, or no room for the model while it does it."""
        is_lost = self.code == "model_unavailable" and self.kind != "server_busy"
        return self.status in BUSY and not is_lost

    @property
    def blames_site(self) -> bool:
        """Whether SITE.yml names the wrong server, key or model: then no model is at fault."""
        return self.status in NOT_OURS or self.code == "odd"


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer to a question, its tokens, and the seconds of the whole request."""

    text: str
    n_tokens: int
    seconds: float

    @property
    def speed(self) -> float:
        """Tokens per second of the whole request."""
        return self.n_tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Look:
    """How a server's model is.

    Attributes
    ----------
    crashes : int
        How often its process ended by itself, since the server started.
    fingerprint : str or None
        Of its files, as `edgemerge.runtime.model_files.find_fingerprint` says; None while it is not loaded.
    """

    crashes: int
    fingerprint: str | None


class Server:
    """A running server.

    Parameters
    ----------
    place : ServerPlace
        Where it is.

    Raises
    ------
    RecipeError
        The key cannot stand in a header.
    """

    def __init__(self, place: ServerPlace) -> None:
        self._place = place
        self._key = _read_key(place)

    @property
    def address(self) -> str:
        """Where it is."""
        return self._place.address

    def check(self) -> None:
        """See that the server takes the key, and has the model that the site names.

        Raises
        ------
        ServerSilence, ServerRefusal
            It is not there; or it is another server, or wants another key or name.
        """
        told = self._send(HEALTH, None, LOOK_SECONDS, takes=(503,))
        models = told.get("models")
        if not isinstance(models, list):
            raise ServerRefusal(
                f"the server at {self.address} does not take the key; correct serve.key of SITE.yml",
                401,
                "invalid_api_key",
            )
        names = [str(one["id"]) for one in models]
        if (wanted := self._place.model) is not None and wanted not in names:
            raise ServerRefusal(
                f"the server at {self.address} has no model {wanted!r}; correct serve.model of SITE.yml: "
                f"{suggest(wanted, names)}",
                404,
                "model_not_found",
            )

    def reload(self, *, asks: bool = True) -> None:
        """Let the file of now answer; requests that run end with the old one.

        A server without room for both, or that a proxy does not reach, is told again for `ROOM_SECONDS`.

        Parameters
        ----------
        asks : bool
            Whether the server refuses a file that answers a simple question worse than the old one.

        Raises
        ------
        ServerSilence, ServerRefusal
            It is not there, or does not take the file; the old one goes on.
        """
        named = {} if self._place.model is None else {"model": self._place.model}
        end = time.monotonic() + ROOM_SECONDS
        while True:
            try:
                self._send(RELOAD, {**named, "ask": asks}, RELOAD_SECONDS)
                return
            except (ServerUnheard, ServerRefusal) as error:
                if isinstance(error, ServerRefusal) and not error.is_busy:
                    raise
                if time.monotonic() >= end:
                    raise
            time.sleep(ROOM_BETWEEN)

    def ask(self, question: str, *, is_chat: bool) -> Reply:
        """Ask the model that serves, at temperature 0, for as much as the rule of promotion reads.

        Raises
        ------
        ServerSilence, ServerRefusal
            It is not there, or does not answer.
        """
        wanted: dict[str, Any] = {"max_tokens": MAX_TOKENS, "temperature": 0}
        if self._place.model is not None:
            wanted["model"] = self._place.model
        if is_chat:
            wanted["messages"] = [{"role": "user", "content": question}]
        else:
            wanted["prompt"] = question
        started = time.monotonic()
        told = self._send(CHAT if is_chat else COMPLETIONS, wanted, ASK_SECONDS)
        seconds = time.monotonic() - started
        try:
            choice = told["choices"][0]
            text = choice["message"]["content"] if is_chat else choice["text"]
            n_tokens = int(told["usage"]["completion_tokens"])
        except (LookupError, TypeError, ValueError) as error:
            raise ServerRefusal(f"{self.address} is no edgemerge server", 200, "odd") from error
        return Reply(str(text or ""), n_tokens, seconds)

    def look(self) -> Look:
        """Look at the model; where SITE.yml names none, at that which answers then, and at all crashes.

        Raises
        ------
        ServerSilence, ServerRefusal
            It is not there, or tells nothing without a key.
        """
        models = self._send(HEALTH, None, LOOK_SECONDS, takes=(503,)).get("models", ())
        wanted = self._place.model
        ours = [one for one in models if wanted in (None, one["id"])]
        fingerprint = ours[0].get("fingerprint") if ours else None
        return Look(sum(int(one["crashes"]) for one in ours), fingerprint)

    def serves(self, current: Path) -> bool:
        """Whether the model in memory is of a file.

        Raises
        ------
        ServerSilence, ServerRefusal
            As of `look`.
        """
        return self.look().fingerprint == find_fingerprint([current])

    def find_difference(self, current: Path) -> str | None:
        """Say that the model in memory is not of a file; None where it is, or where none is in memory.

        Parameters
        ----------
        current : Path
            What the server has to serve.

        Raises
        ------
        ServerSilence, ServerRefusal
            As of `look`.
        """
        if self.look().fingerprint in (None, find_fingerprint([current])):
            return None
        return (
            f"the server at {self.address} serves another file than {current}, or adds an adapter to it; "
            f"start it with edgemerge serve {current}"
        )

    def _send(
        self,
        path: str,
        body: Mapping[str, Any] | None,
        seconds: float,
        takes: tuple[int, ...] = (),
    ) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        raw = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, raw, headers)
        try:
            status, told = _exchange(request, seconds)
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "reason", error)
            raise ServerSilence(f"no server answers at {self.address} ({why})") from None
        if status in PROXY and not _has_words(told):
            message = f"the server at {self.address} does not answer at the moment ({status})"
            raise ServerUnheard(message, status)
        if told is None and status != 429:  # a proxy bounds requests, too
            raise ServerRefusal(f"{self.address} is no edgemerge server", 0, "odd")
        if told is not None and (status < 300 or (status in takes and "error" not in told)):
            return told
        raise _refusal(told or {}, status)


def _exchange(request: urllib.request.Request, seconds: float) -> tuple[int, dict[str, Any] | None]:
    """Return a status, and the object of its answer; None where that is none."""
    try:
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            status, raw = answer.status, answer.read(MAX_BYTES)
    except urllib.error.HTTPError as error:
        with error:
            status, raw = error.code, error.read(MAX_BYTES)
    try:
        told = json.loads(raw)
    except (ValueError, RecursionError):
        told = None
    return status, told if isinstance(told, dict) else None


def _has_words(told: Mapping[str, Any] | None) -> bool:
    """Tell an answer of edgemerge serve from uvicorn's plain 503, and from what a proxy says in its place."""
    return told is not None and (
        isinstance(told.get("error"), dict) or isinstance(told.get("status"), str)
    )


def _refusal(told: Mapping[str, Any], status: int) -> ServerRefusal:
    error = told.get("error")
    error = error if isinstance(error, dict) else {}
    message = str(error.get("message", "no reason"))[:300]
    return ServerRefusal(
        f"the server says: {message} ({status})",
        status,
        str(error.get("code")),
        str(error.get("type")),
    )


def _read_key(place: ServerPlace) -> str | None:
    """Read the server's key.

    Raises
    ------
    RecipeError
        It cannot stand in a header.
    """
    if place.key is None:
        return None
    key = place.key.read_text(encoding="ascii", errors="replace").strip()
    check_characters(key)
    return key
