"""Watches a model that has just been promoted, for a bounded time: its answers, its speed, its crashes."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from edgemerge.fleet.examination import Examiner
from edgemerge.fleet.promotion import find_fault
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
    """How the server was before: crashes so far, and tokens/s of a smoke answer."""

    crashes: int
    speed: float | None


def measure_server(server: Server, model: Path, rule: Rule) -> Baseline:
    """Look at a server before its model is replaced.

    Raises
    ------
    ServerSilence
        Nothing answers there.
    """
    speed = None
    crashes = server.look().crashes
    with suppress(ServerRefusal, ServerUnheard):  # no model, or busy: no speed to compare with
        speed = _ask(server, model, rule).speed
    return Baseline(crashes, speed)


def watch_server(
    server: Server,
    model: Path,
    rule: Rule,
    before: Baseline,
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
    wait : callable
        Waits so many seconds.
    """
    end = time.monotonic() + rule.watch
    n_looks = n_failures = n_unheard = 0
    best: float | None = None
    while True:
        try:
            if server.look().crashes > before.crashes:
                return "llama.cpp ended the process of the model"
            n_unheard = 0
            if n_looks % ASK_EVERY == 0 or n_failures:
                reply = _ask(server, model, rule)
                n_failures = 0
                if (difference := _find_difference(server, model)) is not None:
                    return difference
                best = max(best or 0.0, reply.speed or 0.0)
                answer = Answer(str(model), rule.ask or QUESTIONS[0], reply.text)
                if rule.ask is not None and (fault := find_fault(answer, rule.expect)):
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
    if best and before.speed and best * rule.slowdown < before.speed:
        return (
            f"it is slow: {format_rate(best)} tokens/s at best, and {format_rate(before.speed)} before, "
            f"which is more than {rule.slowdown:g} times slower"
        )
    return None


def _may_be_busy(error: ServerSilence | ServerRefusal) -> bool:
    if isinstance(error, ServerUnheard):
        return error.may_be_full
    return isinstance(error, ServerRefusal) and error.is_busy


def _find_difference(server: Server, model: Path) -> str | None:
    difference = server.find_difference(model)
    return None if difference is None else f"{difference}, then run edgemerge update --again"


def watch_file(examiner: Examiner, model: Path, rule: Rule) -> str | None:
    """Load the file that serves in a child, where no server runs, and ask it; say what is wrong.

    Parameters
    ----------
    examiner : Examiner
        Asks.
    model : Path
        The file.
    rule : Rule
        With the question.
    """
    talk = examiner.talk(model)
    if talk.answer.problem is not None or rule.ask is not None:
        return find_fault(talk.answer, rule.expect)
    return None


def _ask(server: Server, model: Path, rule: Rule) -> Reply:
    return server.ask(rule.ask or QUESTIONS[0], is_chat=has_template(model))


def has_template(model: Path) -> bool:
    """Tell whether a model has a chat template."""
    with closing(GgufModel(model)) as source:
        return isinstance(get_value(source.metadata(), "tokenizer.chat_template"), str)
