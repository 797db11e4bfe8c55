"""Watches a model that has just been promoted, for a bounded time: its answers, its speed, its crashes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from edgemerge.fleet.examination import Examiner
from edgemerge.fleet.promotion import MORE_MEASUREMENTS, find_fault, find_new_fault
from edgemerge.fleet.server import Reply, Server, ServerRefusal, ServerSilence, ServerUnheard
from edgemerge.fleet.site_file import Rule
from edgemerge.formats.gguf.metadata import get_value
from edgemerge.formats.gguf.model import GgufModel
from edgemerge.runtime.smoke import QUESTIONS, Answer
from edgemerge.sizes import format_rate

__all__ = ["Baseline", "measure_server", "watch_file", "watch_server"]

BETWEEN = 1.0  # seconds between looks at the server
ASK_EVERY = 5  # looks
MAX_FAILURES = 2  # answers in a row that fail before the model is at fault


@dataclass(frozen=True, slots=True)
class Baseline:
    """How the server was before: crashes so far, and the old model's reply to the smoke question."""

    crashes: int
    reply: Reply | None

    @classmethod
    def read(cls, noted: Mapping[str, Any] | None, crashes: int) -> Self:
        """Return what was noted, if it was, of a server that has had so many crashes since its start."""
        noted = noted or {"crashes": crashes}
        reply = noted.get("reply")
        return cls(min(crashes, noted["crashes"]), None if reply is None else Reply(**reply))


def measure_server(server: Server, model: Path, rule: Rule) -> Baseline:
    """Look at a server before its model is replaced.

    Raises
    ------
    ServerSilence
        Nothing answers there.
    """
    reply = None
    crashes = server.look().crashes
    with suppress(ServerRefusal, ServerUnheard):  # no model, or busy: nothing to compare with
        reply = _ask(server, model, rule)
    return Baseline(crashes, reply)


def watch_server(
    server: Server,
    model: Path,
    rule: Rule,
    before: Baseline,
    known: str | None = None,
    wait: Callable[[float], None] = time.sleep,
) -> str | None:
    """Watch what a server does with a new model; say what is wrong, None where nothing is.

    Parameters
    ----------
    server : Server
        That was told to reload.
    model : Path
        The new file, by the path that the server has to serve.
    rule : Rule
        With the question, the bound of speed, and the seconds to watch.
    before : Baseline
        The old model's.
    known : str, optional
        Fault of the new model's answer that the rule let pass, as the old one has it too.
    wait : callable
        Waits so many seconds.
    """
    end = time.monotonic() + rule.watch
    n_looks = n_failures = n_unheard = 0
    replies: list[Reply] = []
    old = None if before.reply is None else find_fault(_answer(model, rule, before.reply), None)
    while True:
        try:
            if server.look().crashes > before.crashes:
                return "llama.cpp ended the process of the model"
            n_unheard = 0
            if n_looks % ASK_EVERY == 0 or n_failures:
                replies.append(_ask(server, model, rule))
                n_failures = 0
                if (difference := _find_difference(server, model)) is not None:
                    return difference
                answer = _answer(model, rule, replies[-1])
                if rule.ask is not None and (fault := find_new_fault(rule, answer, (known, old))):
                    return fault
        except (ServerSilence, ServerRefusal) as error:
            n_unheard += isinstance(error, ServerUnheard)
            if not _may_be_busy(error):
                n_failures += 1
            if n_failures >= MAX_FAILURES:
                return f"it does not answer: {error}"
        n_looks += 1
        if time.monotonic() >= end:
            break
        wait(min(BETWEEN, max(0.0, end - time.monotonic())))
    try:
        if (difference := _find_difference(server, model)) is not None:
            return difference  # it may have been too busy to be asked
    except (ServerSilence, ServerRefusal) as error:
        if n_unheard >= MAX_FAILURES:  # a proxy's 503 to the end
            return f"it does not answer: {error}"
    return _find_slowness(server, model, rule, before.reply, replies)


def _find_slowness(
    server: Server, model: Path, rule: Rule, old: Reply | None, replies: list[Reply]
) -> str | None:
    """Say that a model is slow, if it is each time that it was asked, and up to three times more.

    What else the device does at that moment can halve a speed, and a roll back is for good.
    """
    if old is None or not replies:
        return None
    n_more = MORE_MEASUREMENTS
    while all(_is_slower(rule, old, one) for one in replies):
        if n_more == 0:
            best = max(one.speed for one in replies)
            return (
                f"it is slow: {format_rate(best)} tokens/s at best, and {format_rate(old.speed)} before, "
                f"which is more than {rule.slowdown:g} times slower"
            )
        n_more -= 1
        with suppress(ServerSilence, ServerRefusal):
            replies.append(_ask(server, model, rule))
    return None


def _is_slower(rule: Rule, old: Reply, new: Reply) -> bool:
    """Compare seconds, of a longer answer by token: of a short one, most go by before its first token."""
    if not (old.n_tokens and new.n_tokens):
        return False
    return new.seconds > rule.slowdown * old.seconds * max(1.0, new.n_tokens / old.n_tokens)


def _may_be_busy(error: ServerSilence | ServerRefusal) -> bool:
    if isinstance(error, ServerUnheard):
        return error.may_be_full
    return isinstance(error, ServerRefusal) and error.is_busy


def _find_difference(server: Server, model: Path) -> str | None:
    difference = server.find_difference(model)
    return None if difference is None else f"{difference}, then run edgemerge update --again"


def watch_file(examiner: Examiner, model: Path, rule: Rule, known: str | None = None) -> str | None:
    """Load the file that serves in a child, where no server runs, and ask it; say what is wrong.

    Parameters
    ----------
    examiner : Examiner
        Asks.
    model : Path
        The file.
    rule : Rule
        With the question.
    known : str, optional
        As of `watch_server`.
    """
    talk = examiner.talk(model)
    if talk.answer.problem is not None or rule.ask is not None:
        return find_new_fault(rule, talk.answer, (known,))
    return None


def _ask(server: Server, model: Path, rule: Rule) -> Reply:
    return server.ask(rule.ask or QUESTIONS[0], is_chat=has_template(model))


def _answer(model: Path, rule: Rule, reply: Reply) -> Answer:
    return Answer(str(model), rule.ask or QUESTIONS[0], reply.text)


def has_template(model: Path) -> bool:
    """Tell whether a model has a chat template."""
    with closing(GgufModel(model)) as source:
        return isinstance(get_value(source.metadata(), "tokenizer.chat_template"), str)
