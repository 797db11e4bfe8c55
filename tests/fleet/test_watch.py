"""The watch after a promotion is no stricter than the rule that promoted the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgemerge.fleet.promotion import Talk
from edgemerge.fleet.server import Look, Reply, Server
from edgemerge.fleet.site_file import Rule, ServerPlace
from edgemerge.fleet.watch import Baseline, measure_server, watch_server
from edgemerge.runtime.smoke import MAX_TOKENS
from tests.support.updates import KnowingExaminer, better, update, write_site

ASKS = Rule(ask="What is insulin?", watch=0)
EMPTY = "it has no answer to the smoke question"
OLD = Reply("A hormone.", 96, 1.0)


class Answering(Server):
    """A server that gives these replies in turn, and the last one from then on."""

    def __init__(self, *replies: Reply) -> None:
        super().__init__(ServerPlace("http://127.0.0.1:9"))
        self.replies, self.n_asked = list(replies), 0

    def look(self) -> Look:
        return Look(0, None)

    def ask(self, question: str, *, is_chat: bool) -> Reply:
        self.n_asked += 1
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]


def watch(
    device: Path,
    rule: Rule,
    *replies: Reply,
    before: Reply | None = OLD,
    known: str | None = None,
) -> str | None:
    model = device.parent / "base.gguf"
    return watch_server(Answering(*replies), model, rule, Baseline(0, before), known)


def test_a_server_is_asked_for_as_many_tokens_as_the_rule_reads() -> None:
    """Fault: it was asked for 24, so a word that the rule found at the 30th was missing."""

    class Told(Server):
        def _send(
            self,
            path: str,
            body: Mapping[str, Any] | None,
            seconds: float,
            takes: tuple[int, ...] = (),
        ) -> dict[str, Any]:
            assert body is not None
            return {"choices": [{"text": ""}], "usage": {"completion_tokens": body["max_tokens"]}}

    reply = Told(ServerPlace("http://127.0.0.1:9")).ask("?", is_chat=False)
    assert reply.n_tokens == MAX_TOKENS


def test_what_the_old_model_does_too_is_no_fault_on_the_server(device: Path) -> None:
    nothing = Reply("", 0, 1.0)
    assert watch(device, ASKS, nothing) == EMPTY
    assert watch(device, ASKS, nothing, before=None) == EMPTY
    assert watch(device, ASKS, nothing, before=nothing) is None
    assert watch(device, ASKS, nothing, before=None, known=EMPTY) is None
    assert watch(device, replace(ASKS, expect="hormone"), nothing, before=nothing) == EMPTY
    before = measure_server(Answering(nothing), device.parent / "base.gguf", ASKS)
    assert before == Baseline(0, nothing)


@pytest.mark.parametrize("serves", [False, True])
def test_what_the_old_model_does_too_is_no_fault_in_a_child(device: Path, serves: bool) -> None:
    class Looping(KnowingExaminer):
        def talk(self, model: Path) -> Talk:
            said = super().talk(model)
            return replace(said, answer=replace(said.answer, text="a a a", loops=True))

    if serves:
        assert update(device, KnowingExaminer(better)).outcome == "promoted"
    promote = {"watch": 0, "better": [], "smoke": {"ask": "What is insulin?"}}
    write_site(device.parent, experts=[{"path": "b.gguf"}], promote=promote)
    report = update(device, Looping(better))
    assert (report.outcome, report.failures) == ("promoted", [])


@pytest.mark.parametrize(
    ("replies", "is_slow"),
    [
        ([Reply("Insulin.", 4, 0.3)], False),  # 13 tokens/s, as most went by before the first
        ([Reply("Insulin.", 4, 1.6)], True),
        ([Reply("A hormone.", 96, 2.0)], True),
        ([Reply("A hormone.", 192, 2.5)], False),
        ([Reply("A hormone.", 96, 2.0), Reply("A hormone.", 96, 1.1)], False),  # it was cold
        ([Reply("", 0, 2.0)], False),
    ],
)
def test_a_model_is_slow_if_it_is_each_time(
    device: Path, replies: list[Reply], is_slow: bool
) -> None:
    found = watch(device, Rule(watch=0), *replies)
    assert (found is not None) == is_slow
    if found is not None:
        assert found.startswith("it is slow: ")
        assert found.endswith("96 before, which is more than 1.5 times slower")


def test_what_was_noted_before_is_read_again() -> None:
    assert Baseline.read(
        {"crashes": 2, "reply": {"text": "", "n_tokens": 0, "seconds": 1.0}}, 3
    ) == (Baseline(2, Reply("", 0, 1.0)))
    assert Baseline.read({"crashes": 2, "speed": 9.0}, 1) == Baseline(1, None)  # a server of now
    assert Baseline.read(None, 1) == Baseline(1, None)
