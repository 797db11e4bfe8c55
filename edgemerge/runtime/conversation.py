"""A conversation with a model: what was said, within the model's context, and on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from edgemerge.errors import FormatError, RuntimeFailure
from edgemerge.output.file import check_output, write_file
from edgemerge.runtime.generate import End, Session, read_prompt
from edgemerge.runtime.template import Message, Template

__all__ = ["Conversation", "Turn", "read_messages", "write_messages"]

_ANSWER = 4  # a quarter of the context is kept for the answer


class Turn(NamedTuple):
    """A message of the user and the model's answer."""

    message: str
    answer: str


class Conversation:
    """What was said so far, and a model to go on with.

    Parameters
    ----------
    session : Session
        The model, and what it has computed.
    template : Template
        Its chat template.
    system : str
        System prompt; empty for none.
    max_tokens : int, optional
        Most tokens of an answer; by default as many as the context has room for.
    stops : sequence of str
        Texts that end an answer.

    Attributes
    ----------
    turns : list of Turn
        What was said; the model sees all of it.
    n_forgotten : int
        Turns that the last message pushed out of the context.
    """

    def __init__(
        self,
        session: Session,
        template: Template,
        *,
        system: str = "",
        max_tokens: int | None = None,
        stops: Sequence[str] = (),
    ) -> None:
        self.session = session
        self.template = template
        self.system = system
        self.max_tokens = max_tokens
        self.stops = tuple(stops)
        self.turns: list[Turn] = []
        self.n_forgotten = 0

    def ask(
        self, message: str, *, progress: Callable[[int, int], None] | None = None
    ) -> Generator[str, None, None]:
        """Say something and yield the answer as it comes.

        The turn counts as said when the answer ends, or when the caller closes the iterator after
        some of it. Where the context is too small, the oldest turns are forgotten, down to half of
        it, so that not each further message forgets one and has all the others computed again.

        Parameters
        ----------
        message : str
            What the user says.
        progress : callable, optional
            Called with the number of prompt tokens that are computed, and of all.

        Raises
        ------
        RuntimeFailure
            The message and the system prompt alone are too long.
        FormatError
            The chat template fails.
        """
        return self._start(self.turns, message, [], progress)

    def retry(
        self, *, progress: Callable[[int, int], None] | None = None
    ) -> Generator[str, None, None]:
        """Ask the last message again; its answer is replaced as soon as there is some of a new one.

        Errors are those of `ask`; there must be a last message.
        """
        *past, last = self.turns
        return self._start(past, last.message, [last], progress)

    def _start(
        self,
        past: list[Turn],
        message: str,
        otherwise: list[Turn],
        progress: Callable[[int, int], None] | None,
    ) -> Generator[str, None, None]:
        """Ask a message after some turns; `otherwise` follows those if nothing is answered."""
        kept, tokens = self._fit(past, message)
        self.n_forgotten = len(past) - len(kept)
        self.turns = [*kept, *otherwise]
        pieces = self.session.generate(tokens, self.max_tokens, stops=self.stops, progress=progress)
        return self._record(kept, message, pieces)

    def _fit(self, past: list[Turn], message: str) -> tuple[list[Turn], list[int]]:
        """Find the turns that the context has room for, and all the tokens with the message."""
        n_ctx = self.session.n_ctx
        room = n_ctx - n_ctx // _ANSWER
        tokens = self._read(past, message)
        if len(tokens) <= room:
            return past, tokens
        n_least = len(self._read([], message))
        if n_least > room:
            raise RuntimeFailure(
                f"the message has {n_least} tokens with the system prompt, and the context of "
                f"{n_ctx} takes {room}: shorten it or give a larger -c"
            )
        while past and len(tokens) > n_ctx // 2:
            past = past[1:]
            tokens = self._read(past, message)
        return past, tokens

    def _read(self, turns: Sequence[Turn], message: str) -> list[int]:
        messages = [*self._past(turns), {"role": "user", "content": message}]
        return read_prompt(self.session.model, self.template.render(messages))

    def _record(
        self, past: list[Turn], message: str, pieces: Iterator[str]
    ) -> Generator[str, None, None]:
        said: list[str] = []
        try:
            for piece in pieces:
                said.append(piece)
                yield piece
        finally:
            if said or self.session.figures.end is not End.BROKEN_OFF:
                self.turns = [*past, Turn(message, "".join(said))]

    @property
    def messages(self) -> list[Message]:
        """What was said, system prompt first."""
        return self._past(self.turns)

    @messages.setter
    def messages(self, messages: Sequence[Message]) -> None:
        has_system = bool(messages) and messages[0]["role"] == "system"
        self.system = messages[0]["content"] if has_system else ""
        texts = [message["content"] for message in messages[has_system:]]
        self.turns = [Turn(*pair) for pair in zip(texts[::2], texts[1::2], strict=True)]

    def _past(self, turns: Sequence[Turn]) -> list[Message]:
        messages: list[Message] = []
        if self.system:
            messages.append({"role": "system", "content": self.system})
        for turn in turns:
            messages.append({"role": "user", "content": turn.message})
            messages.append({"role": "assistant", "content": turn.answer})
        return messages


def write_messages(messages: Sequence[Message], path: Path, *, force: bool) -> None:
    """Write a conversation as JSON: an object with `messages`, as OpenAI's interface has them.

    Raises
    ------
    OutputError
        The file exists and `force` is not given, or cannot be written.
    """
    check_output(path, (), force=force)
    text = json.dumps({"messages": list(messages)}, ensure_ascii=False, indent=2)
    write_file(path, f"{text}\n".encode())


def read_messages(path: Path) -> list[Message]:
    """Read a conversation that `write_messages` wrote.

    Raises
    ------
    FormatError
        It is no such file: a system message or none, then user and assistant by turns.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(
            document, ensure_ascii=False
        ).encode()  # refuses half a surrogate pair, "\\ud800"
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not JSON ({error})", path=path) from error
    messages = document.get("messages") if isinstance(document, dict) else None
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise FormatError(
            "no conversation: expected an object with 'messages', each with a role and a content",
            path=path,
        )
    roles = [message["role"] for message in messages]
    said = roles[1:] if roles[:1] == ["system"] else roles
    if said != ["user", "assistant"] * (len(said) // 2):
        raise FormatError("user and assistant must speak by turns, the user first", path=path)
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _is_message(item: object) -> bool:
    return isinstance(item, dict) and all(
        isinstance(item.get(key), str) for key in ("role", "content")
    )
