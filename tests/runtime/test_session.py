from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from edgemerge.errors import RuntimeFailure
from edgemerge.runtime.batch import Aborted
from edgemerge.runtime.engine.draw import MAX_SEED
from edgemerge.runtime.engine.messages import Sampling
from edgemerge.runtime.generate import End, Session, read_prompt
from edgemerge.runtime.llama import Model
from tests.support.odd_kinds import write_kind
from tests.support.tiny_gguf import CONTEXT

pytestmark = pytest.mark.llama

GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def model(tiny_gguf: Path) -> Iterator[Model]:
    with Model(tiny_gguf, n_threads=1) as loaded:
        yield loaded


@pytest.fixture
def session(model: Model) -> Iterator[Session]:
    with Session(model, CONTEXT, GREEDY) as opened:
        yield opened


def fresh(model: Model, text: str, n: int, sampling: Sampling = GREEDY) -> str:
    with Session(model, CONTEXT, sampling) as opened:
        return "".join(opened.generate(read_prompt(model, text), n))


def test_a_prompt_is_run_from_where_it_differs(model: Model, session: Session) -> None:
    first, longer, other = "the answer of", "the answer of the answer", "the answer in the end"
    "".join(session.generate(read_prompt(model, first), 6))
    assert session.figures.n_reused == 0
    for text in (longer, other, first, first):
        tokens = read_prompt(model, text)
        assert "".join(session.generate(tokens, 6)) == fresh(model, text, 6), text
        assert 0 < session.figures.n_reused < len(tokens)
    assert session.figures.n_reused == session.figures.n_prompt - 1  # for the logits of the last


def test_what_cannot_be_cut_back_is_run_again(
    model: Model, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a model with a running state."""

    remove = model.api.llama_memory_seq_rm

    def refuse(memory: Any, sequence: int, start: int, end: int) -> bool:
        return start <= 0 and remove(memory, sequence, start, end)

    "".join(session.generate(read_prompt(model, "the answer of"), 3))
    monkeypatch.setattr(model.api, "llama_memory_seq_rm", refuse)
    text = "".join(session.generate(read_prompt(model, "the answer in"), 6))
    assert text == fresh(model, "the answer in", 6)
    assert session.figures.n_reused == 0


def test_figures(model: Model, session: Session) -> None:
    tokens = read_prompt(model, "the answer")
    "".join(session.generate(tokens, 5))
    figures = session.figures
    assert (figures.n_prompt, figures.n_generated, figures.n_steps) == (len(tokens), 5, 4)
    assert figures.end is End.LENGTH
    assert figures.first_token_seconds is not None
    assert 0 < figures.prompt_seconds <= figures.first_token_seconds
    assert figures.rate == 4 / figures.step_seconds
    assert figures.prompt_rate == len(tokens) / figures.prompt_seconds
    "".join(session.generate(tokens, 1))
    assert session.figures.rate is None


def test_a_text_ends_where_the_context_does(model: Model) -> None:
    tokens = read_prompt(model, "the answer")
    with Session(model, len(tokens) + 3, GREEDY) as session:
        "".join(session.generate(tokens))
        assert (session.figures.end, session.figures.n_generated) == (End.CONTEXT, 3)
        "".join(session.generate(tokens, 100))
        assert session.figures.end is End.CONTEXT
        with pytest.raises(RuntimeFailure, match=f"context is {len(tokens) + 3}: shorten"):
            session.generate(tokens * 5)
        with pytest.raises(RuntimeFailure, match="the prompt is empty"):
            session.generate([])


def test_the_models_end_is_not_said(model: Model, session: Session) -> None:
    tokens = read_prompt(model, "the answer")
    kept = model.is_end
    said = iter([False, False, True])
    model.is_end = lambda token: next(said)  # type: ignore[method-assign]
    try:
        "".join(session.generate(tokens, 10))
    finally:
        model.is_end = kept  # type: ignore[method-assign]
    assert (session.figures.end, session.figures.n_generated) == (End.MODEL, 2)


def test_progress_of_a_long_prompt(
    model: Model, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session._scheduler, "_n_chunk", 10)
    seen: list[tuple[int, int]] = []
    tokens = read_prompt(model, "x" * 24)
    list(session.generate(tokens, 1, progress=lambda *at: seen.append(at)))
    assert seen == [(at, len(tokens)) for at in (0, 10, 20, len(tokens))]


def test_a_text_that_is_left_can_be_followed_by_another(model: Model, session: Session) -> None:
    with closing(session.generate(read_prompt(model, "the answer"), 50)) as pieces:  # type: ignore[type-var]
        next(pieces)
    assert session.figures.end is End.BROKEN_OFF
    text = "".join(session.generate(read_prompt(model, "the answer of"), 6))
    assert text == fresh(model, "the answer of", 6)


def test_ctrl_c_stops_what_computes(
    model: Model, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = []

    def compute(*_arguments: Any) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        for _ in range(3000):  # a long prompt, 30 s unless it is told to stop
            time.sleep(0.01)
            if session._worker.is_stopped:
                break
        time.sleep(0.1)
        ended.append(session._worker.is_stopped)
        raise Aborted("it was told to stop")

    monkeypatch.setattr(session._scheduler._batch, "run", compute)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            list(session.generate(read_prompt(model, "the answer"), 5))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert ended == [True]  # nothing computes any more when the caller goes on
    monkeypatch.undo()
    text = "".join(session.generate(read_prompt(model, "the answer"), 6))
    assert text == fresh(model, "the answer", 6)


def test_llama_cpp_asks_whether_to_stop(model: Model, session: Session) -> None:
    session._worker.is_stopped = True
    with pytest.raises(RuntimeFailure, match="with status 2"):
        session.context.decode([5], [True])
    text = "".join(session.generate(read_prompt(model, "the answer"), 6))
    assert text == fresh(model, "the answer", 6)


@pytest.mark.parametrize("kind", ["granite hybrid", "mamba", "qwen2 moe"])
def test_a_computation_that_was_stopped_is_begun_anew(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: a running state had a part of the batch, and the next prompt was "inconsistent" with it."""

    def interrupted(work: Callable[[], Any]) -> None:
        work()
        raise KeyboardInterrupt  # as of a worker after Ctrl-C

    path = write_kind(kind, tmp_path)[0]
    with Model(path, n_threads=1) as model, Session(model, CONTEXT, GREEDY) as session:
        list(session.generate(read_prompt(model, "the answer"), 4))
        (slot,) = session._slots
        for more in (" of it", " in the end"):
            prompt, asked = [*slot.tokens, *model.tokenize(more)], count()
            stop = model.api.ggml_abort_callback(lambda _, asked=asked: next(asked) > 5)
            model.api.llama_set_abort_callback(session.context.handle, stop, None)
            with monkeypatch.context() as patched:
                patched.setattr(session._worker, "do", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    list(session.generate(prompt, 4))
            assert next(asked) > 6  # it was told to stop
            model.api.llama_set_abort_callback(session.context.handle, session._abort, None)
            text = "".join(session.generate(prompt, 4))
            with Session(model, CONTEXT, GREEDY) as another:
                assert text == "".join(another.generate(prompt, 4))


def test_repetition_costs(model: Model) -> None:
    prompt = "the answer of " * 8
    plain = fresh(model, prompt, 40)
    assert fresh(model, prompt, 40, Sampling(temperature=0.0, repeat_penalty=1.0)) == plain
    held = Sampling(temperature=0.0, repeat_penalty=1e6)
    said: list[int] = []
    with Session(model, CONTEXT, held) as session:
        tokens = read_prompt(model, prompt)
        sample = session._sampler.sample
        session._sampler.sample = lambda *at: said.append(sample(*at)) or said[-1]  # type: ignore[func-returns-value, method-assign]
        list(session.generate(tokens, 20))
    assert len(set(said)) == len(said)  # none twice, and
    assert not set(said) & set(tokens[-40:])  # none of the prompt


def test_draws_go_on_and_repeat_by_seed(model: Model) -> None:
    def draw(seed: int) -> list[str]:
        with Session(model, CONTEXT, Sampling(temperature=1.5, seed=seed)) as session:
            tokens = read_prompt(model, "the answer")
            return ["".join(session.generate(tokens, 12)) for _ in range(3)]

    assert draw(7) == draw(7)
    assert len(set(draw(7))) > 1
    assert draw(MAX_SEED) == draw(MAX_SEED)
