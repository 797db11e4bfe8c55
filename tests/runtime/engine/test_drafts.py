"""Guesses make an answer quicker and never another one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemerge.runtime.engine import drafts
from edgemerge.runtime.engine.drafts import MOST, Drafts
from edgemerge.runtime.engine.messages import Sampling
from tests.runtime.engine.test_scheduler import Bench, bench
from tests.support.engines import GREEDY, Told

PROMPT = "the answer of the one, the answer of the two, the answer of"
# three tokens far ahead of all others: what is drawn repeats itself soon, and not always
FEW = tuple((token, 12.0) for token in (260, 270, 280))


@pytest.fixture
def engine(tiny_gguf: Path) -> Iterator[Bench]:
    with bench(tiny_gguf) as opened:
        yield opened


def ask(
    engine: Bench, prompt: str = PROMPT, n: int = 40, *args: Any, **more: Any
) -> tuple[Told, int]:
    """An answer, and the batches that it took."""
    key = engine.add(prompt, n, *args, **more)
    n_steps = 0
    while not engine.scheduler.is_idle:
        engine.step()
        n_steps += 1
    return engine.told[key], n_steps


@pytest.mark.llama
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("more", [{}, {"n_alternatives": 2}, {"stops": ("er of", "in")}])
def test_answers_are_the_same_with_guesses(
    engine: Bench, monkeypatch: pytest.MonkeyPatch, temperature: float, more: dict[str, Any]
) -> None:
    monkeypatch.setattr(drafts, "_KEY", 4)  # a random model repeats short runs only
    samplings = [Sampling(temperature=temperature, seed=s, bias=FEW) for s in range(4)]
    guessed = [ask(engine, PROMPT, 40, one, **more) for one in samplings]
    monkeypatch.setattr(Drafts, "guess", lambda *_: [])
    plain = [ask(engine, PROMPT, 40, one, **more) for one in samplings]
    for (with_guesses, _), (without, _) in zip(guessed, plain, strict=True):
        assert (with_guesses.text, with_guesses.reason) == (without.text, without.reason)
        scores = [
            [score.logprob for piece in told.pieces for score in piece.scores]
            for told in (with_guesses, without)
        ]
        assert scores[0] == pytest.approx(scores[1], abs=1e-2)  # in half precision
    assert sum(n for _, n in guessed) < sum(n for _, n in plain)


@pytest.mark.llama
def test_what_was_guessed_wrong_is_not_kept(engine: Bench) -> None:
    """A second answer goes on from what the first left in the cache."""
    hot = Sampling(temperature=1.0, seed=3, bias=FEW)
    first, _ = ask(engine, PROMPT, 30, hot)
    text = f"{PROMPT}{first.text}"
    again, _ = ask(engine, text, 12, GREEDY)
    engine.scheduler._slots.clear()
    for kept in list(engine.scheduler._slots.store):
        engine.scheduler._slots.store._kept.remove(kept)
    fresh, _ = ask(engine, text, 12, GREEDY)
    assert again.n_reused > 10
    assert fresh.n_reused == 0
    assert again.text == fresh.text


@pytest.mark.llama
def test_there_are_none_beside_others(engine: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> list[int]:
        raise AssertionError("a guess")

    monkeypatch.setattr(Drafts, "guess", fail)
    keys = [engine.add(PROMPT, 8, Sampling(temperature=0.0)) for _ in range(2)]
    while min(len(engine.told[key].pieces) for key in keys) < 4:
        engine.step()


def test_a_guess_is_what_followed_last() -> None:
    guesses = Drafts()
    guesses.note(1, 1, 0)
    known = [0, 1, 2, 3, 4, 5]
    assert guesses.guess(known, MOST) == []
    assert guesses.guess([*known, 6, 7, *known], MOST) == [6, 7]
    tokens = [*known, 6, 7, *known, 8, *known]
    assert guesses.guess(tokens, MOST) == [8, 0]
    assert guesses.guess(tokens, 1) == [8]


def test_what_repeats_itself_goes_on() -> None:
    guesses = Drafts()
    for n in (1, 2, 4):
        guesses.note(n, n, 0)
    assert guesses.guess([9, 1, 2, 1, 2, 1, 2, 1, 2], MOST) == [1, 2, 1, 2, 1, 2, 1, 2]


def test_right_guesses_become_longer_and_wrong_ones_rest() -> None:
    guesses = Drafts()
    tokens = [*range(30), *range(10)]
    assert len(guesses.guess(tokens, MOST)) == 1
    for n in (1, 2, 4):
        guesses.note(n, n, 40)
    assert len(guesses.guess([*tokens, 10], MOST)) == MOST
    guesses.note(8, 3, 41)
    assert len(guesses.guess([*tokens, 10, 11], MOST)) == 1
    guesses.note(1, 0, 42)
    assert guesses.guess([*tokens, 10, 11, 12], MOST) == []
    assert guesses.guess([*tokens, *range(10, 28)], MOST) == [28]


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(1, MOST))
def test_guesses_come_from_the_text(tokens: list[int], most: int) -> None:
    guesses = Drafts()
    for n in range(len(tokens) + 1):
        found = guesses.guess(tokens[:n], most)
        assert len(found) <= most
        if found:
            whole = ",".join(map(str, [*tokens[n - 4 : n], found[0]]))
            assert whole in ",".join(map(str, tokens[:n]))
