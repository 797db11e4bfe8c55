from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgemerge.errors import FormatError, OutputError, RuntimeFailure
from edgemerge.runtime.board.memory import Memory
from edgemerge.runtime.context_size import choose_context
from edgemerge.runtime.conversation import Conversation, Turn, read_messages, write_messages
from edgemerge.runtime.engine.messages import Sampling
from edgemerge.runtime.generate import End, Session, read_prompt
from edgemerge.runtime.llama import Model
from edgemerge.runtime.template import Template
from tests.support.tiny_gguf import CONTEXT

pytestmark = pytest.mark.llama

TEMPLATE = (
    "<s>{% for m in messages %}{{ m.role[0] }}.{{ m.content }}.{% endfor %}"
    "{% if add_generation_prompt %}a.{% endif %}"
)
MESSAGES = [
    {"role": "system", "content": "be brief, é"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "good day"},
]


@pytest.fixture(scope="module")
def model(tiny_gguf: Path) -> Iterator[Model]:
    with Model(tiny_gguf, n_threads=1) as loaded:
        yield loaded


@pytest.fixture
def talk(model: Model) -> Iterator[Conversation]:
    with Session(model, CONTEXT, Sampling(temperature=0.0)) as session:
        yield Conversation(session, Template(TEMPLATE, model.path, bos="<s>"), max_tokens=5)


def say(talk: Conversation, message: str) -> str:
    return "".join(talk.ask(message))


def test_turns_follow_each_other_and_are_computed_once(talk: Conversation) -> None:
    first = say(talk, "the answer")
    n_first = talk.session.figures.n_prompt
    second = say(talk, "of the end")
    assert talk.turns == [Turn("the answer", first), Turn("of the end", second)]
    # all but what the answer's text, read as tokens, differs in from the tokens that were drawn
    assert talk.session.figures.n_reused >= n_first
    talk.system = "be brief"
    say(talk, "in the end")
    assert talk.session.figures.n_reused <= 3  # the beginning of sequence
    assert [m["role"] for m in talk.messages] == ["system", *["user", "assistant"] * 3]


def test_the_answer_is_that_of_the_whole_conversation_at_once(talk: Conversation) -> None:
    talk.system = "be brief"
    first = say(talk, "the answer")
    second = say(talk, "of the end")
    text = f"<s>s.be brief.u.the answer.a.{first}.u.of the end.a."
    model = talk.session.model
    with Session(model, CONTEXT, Sampling(temperature=0.0)) as session:
        assert "".join(session.generate(read_prompt(model, text), 5)) == second


def test_the_oldest_turns_are_forgotten_to_half_the_context(talk: Conversation) -> None:
    talk.system = "be brief"
    forgotten = []
    for i in range(20):
        say(talk, f"the answer of the end in the end {'abcdefghijklmnopqrst'[i]}")
        forgotten.append(talk.n_forgotten)
        assert talk.session.figures.n_prompt <= CONTEXT * 3 / 4
        assert talk.session.figures.end is End.LENGTH
        assert talk.messages[0] == {"role": "system", "content": "be brief"}
    assert sum(forgotten) == 20 - len(talk.turns)
    assert max(forgotten) > 1
    assert forgotten.count(0) > 12  # not one with each message


def test_a_message_that_is_too_long_changes_nothing(talk: Conversation) -> None:
    say(talk, "the answer")
    turns = talk.turns
    with pytest.raises(RuntimeFailure, match=r"has \d+ tokens .* takes 192: shorten it or give a"):
        talk.ask("x" * 200)
    assert talk.turns == turns
    assert say(talk, "of the end")


def test_what_was_said_before_a_stop_is_kept(talk: Conversation) -> None:
    answer = talk.ask("the answer")
    piece = next(answer)
    answer.close()
    assert talk.turns == [Turn("the answer", piece)]


def test_a_turn_without_an_answer_is_not_said(
    talk: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(talk, "the answer")
    turns = talk.turns

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(talk.session._worker, "do", interrupt)
    with pytest.raises(KeyboardInterrupt):
        say(talk, "of the end")
    assert talk.turns == turns
    with pytest.raises(KeyboardInterrupt):
        "".join(talk.retry())
    assert talk.turns == turns


def test_retry_replaces_the_last_answer(talk: Conversation) -> None:
    first, second = say(talk, "the answer"), say(talk, "of the end")
    talk.max_tokens = 8
    again = "".join(talk.retry())
    assert again.startswith(second)
    assert again != second
    assert talk.turns == [Turn("the answer", first), Turn("of the end", again)]


def test_a_conversation_on_disk(talk: Conversation, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    write_messages(MESSAGES, path, force=False)
    assert json.loads(path.read_text(encoding="utf-8")) == {"messages": MESSAGES}
    assert [file.name for file in tmp_path.iterdir()] == ["talk.json"]
    talk.messages = read_messages(path)
    assert (talk.system, talk.turns) == ("be brief, é", [Turn("hello", "good day")])
    assert talk.messages == MESSAGES
    talk.messages = MESSAGES[1:]
    assert talk.messages == MESSAGES[1:]
    with pytest.raises(OutputError, match="exists already"):
        write_messages([], path, force=False)
    write_messages([], path, force=True)
    talk.messages = read_messages(path)
    assert talk.messages == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("1" * 5000, "not JSON"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "not JSON"),
        ("[]", "no conversation: expected an object with 'messages'"),
        ('{"messages": [1]}', "no conversation"),
        ('{"messages": [{"role": "user", "content": null}]}', "no conversation"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "must speak by turns"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "must speak by turns"),
    ],
)
def test_a_file_that_is_no_conversation_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "talk.json"
    path.write_text(text)
    with pytest.raises(FormatError, match=rf"talk\.json: .*{reason}"):
        read_messages(path)


def test_the_context_is_what_is_wanted_trained_or_affordable(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose_context(model, 100) == 100
    assert choose_context(model, 4096) == model.n_ctx_train == CONTEXT
    monkeypatch.setattr(model, "n_ctx_train", 100_000)
    assert choose_context(model, 4096) == 4096
    with model.context(256, n_batch=1) as context:
        bytes_per_token = context.buffers.kv / 256
    for available, expected in ((2000, 1600), (100, 512)):
        free = Memory(0, int(available * bytes_per_token), 0, 0)
        monkeypatch.setattr("edgemerge.runtime.context_size.read_memory", lambda free=free: free)
        monkeypatch.setattr(
            "edgemerge.runtime.context_size.read_process", lambda: type("Process", (), {"file": 0})
        )
        assert choose_context(model, 4096) == pytest.approx(expected, abs=1)
