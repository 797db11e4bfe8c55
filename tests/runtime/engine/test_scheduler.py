from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgemerge.errors import RuntimeFailure
from edgemerge.machine.process import read_process
from edgemerge.runtime.engine.answer import Answer
from edgemerge.runtime.engine.draw import BadGrammar
from edgemerge.runtime.engine.messages import Ended, Failed, Generation, Sampling
from edgemerge.runtime.engine.options import EngineOptions
from edgemerge.runtime.engine.prompts import read_generation
from edgemerge.runtime.engine.scheduler import Scheduler
from edgemerge.runtime.engine.setup import Loaded, load
from edgemerge.runtime.engine.store import common_length
from tests.support import tiny_gguf as tiny_gguf_file
from tests.support.engines import GREEDY, Told
from tests.support.tiny_gguf import CONTEXT, write_tiny_gguf

pytestmark = pytest.mark.llama

PROMPTS = [
    f"the answer of {word}" for word in ["one", "in", "on", "a", "the", "er", "x", "the,answer"]
]


class Bench:
    """A scheduler, stepped by hand."""

    def __init__(self, loaded: Loaded, options: EngineOptions) -> None:
        self.loaded = loaded
        self.scheduler = Scheduler(
            loaded.model,
            loaded.context,
            loaded.slots,
            n_chunk=options.n_chunk,
            n_rows=loaded.n_rows,
        )
        self.told: dict[int, Told] = {}
        self.failed: dict[int, str] = {}

    def add(self, prompt: Any, n: int = 8, sampling: Sampling = GREEDY, **more: Any) -> int:
        wanted = Generation(prompt, n, sampling, **more)
        model, n_ctx = self.loaded.model, self.loaded.facts.n_ctx
        tokens, n_put = read_generation(model, None, wanted, n_ctx)
        key = len(self.told) + 1
        self.told[key] = Told()
        self.scheduler.add(Answer(key, model, wanted, tokens, n_put, n_ctx))
        return key

    def step(self) -> set[int]:
        """One batch; the requests that it gave something for."""
        events = self.scheduler.step()
        for key, event in events:
            if isinstance(event, Failed):
                self.failed[key] = event.reason
            self.told[key].take(event)
        return {key for key, _ in events}

    def finish(self) -> None:
        while not self.scheduler.is_idle:
            self.step()

    def ask(self, *asked: Any, **more: Any) -> Told:
        key = self.add(*asked, **more)
        self.finish()
        return self.told[key]


@contextmanager
def bench(path: Path, **options: Any) -> Iterator[Bench]:
    chosen = EngineOptions(path, **{"n_ctx": 1024, "n_threads": 1, **options})
    loaded = load(chosen)
    yield Bench(loaded, chosen)
    loaded.context.close()
    loaded.model.close()


@pytest.fixture
def engine(tiny_gguf: Path) -> Iterator[Bench]:
    with bench(tiny_gguf) as opened:
        yield opened


def alone(path: Path, prompts: Sequence[str], n: int, **options: Any) -> list[str]:
    texts = []
    for prompt in prompts:
        with bench(path, **options) as opened:
            texts.append(opened.ask(prompt, n).text)
    return texts


@pytest.mark.parametrize("options", [{}, {"n_chunk": 4}, {"flash": False}])
def test_answers_are_the_same_beside_others(tiny_gguf: Path, options: dict[str, Any]) -> None:
    texts = alone(tiny_gguf, PROMPTS, 24, **options)
    with bench(tiny_gguf, **options) as engine:
        keys = [engine.add(prompt, 24) for prompt in PROMPTS]
        engine.finish()
        assert [engine.told[key].text for key in keys] == texts


def test_the_cache_may_be_of_half_the_size(
    tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeFailure, match="block size 32 does not divide"):
        alone(tiny_gguf, PROMPTS[:1], 8, kv_type="q8_0")
    monkeypatch.setattr(tiny_gguf_file, "N_HEADS", 2)  # of 32 numbers each
    path = write_tiny_gguf(tmp_path / "wide.gguf")
    sizes = {}
    for kind in ("f16", "q8_0"):
        with bench(path, kv_type=kind) as engine:
            assert engine.ask("the answer", 8).text
            sizes[kind] = engine.loaded.facts.memory["kv"]
    assert sizes["q8_0"] == pytest.approx(sizes["f16"] * 34 / 64, rel=0.1)


def test_a_long_prompt_lets_others_go_on(tiny_gguf: Path) -> None:
    with bench(tiny_gguf, n_chunk=16) as engine:
        first = engine.add("the", 100)
        while not engine.told[first].pieces:
            engine.step()
        long = engine.add("x" * 200, 4)
        before = len(engine.told[first].pieces)
        n_steps = 0
        while not engine.told[long].pieces:
            engine.step()
            n_steps += 1
        assert n_steps >= 200 // 16
        tokens = sum(piece.n_tokens for piece in engine.told[first].pieces[before:])
        assert tokens >= n_steps // 2 - 2  # some wait for the rest of a character


def test_a_full_pool_makes_some_wait_and_none_fail(tiny_gguf: Path) -> None:
    texts = alone(tiny_gguf, PROMPTS, 100, flash=False)
    with bench(tiny_gguf, n_ctx=CONTEXT, flash=False) as engine:
        keys = [engine.add(prompt, 100) for prompt in PROMPTS]
        engine.finish()
        assert not engine.failed
        assert [engine.told[key].text for key in keys] == texts
        # what is kept is forgotten for a request that needs all of the room
        key = engine.add("x" * 200, 40)
        engine.finish()
        assert engine.told[key].ended is not None


def test_beginnings_are_computed_once(engine: Bench, tiny_gguf: Path) -> None:
    beginning = "the answer of the answer in the end, "
    n = len(engine.loaded.model.tokenize(beginning))
    assert engine.ask(beginning + "one", 4).n_reused == 0
    texts = {}
    keys = [engine.add(beginning + word, 12) for word in ("two", "three", "on")]
    engine.finish()
    for key, word in zip(keys, ("two", "three", "on"), strict=True):
        assert engine.told[key].n_reused >= n
        texts[word] = engine.told[key].text
    for word, text in texts.items():
        assert alone(tiny_gguf, [beginning + word], 12) == [text]


def test_requests_that_come_together_compute_their_beginning_once(tiny_gguf: Path) -> None:
    beginning = "the answer in the end, " * 4
    with bench(tiny_gguf, n_chunk=16) as engine:
        n = len(engine.loaded.model.tokenize(beginning))
        keys = [engine.add(f"{beginning}{i}", 4) for i in range(6)]
        engine.finish()
        reused = [engine.told[key].n_reused for key in keys]
    assert reused[0] == 0
    assert min(reused[1:]) >= n - 32


def test_a_conversation_goes_on_where_it_was(engine: Bench) -> None:
    first = engine.add([1, 5, 6, 7], 8)
    engine.finish()
    answer = engine.told[first]
    assert answer.ended is not None
    again = engine.add([1, 5, 6, 7], 8)
    engine.finish()
    assert engine.told[again].n_reused == 3  # the last is run for its logits
    assert engine.told[again].text == answer.text


def test_what_is_left_is_computed_no_further(engine: Bench) -> None:
    keys = [engine.add("the answer", 200) for _ in range(9)]  # one more than there are sequences
    engine.step()
    for key in keys:
        engine.scheduler.cancel(key)
    assert engine.scheduler.is_idle
    assert engine.loaded.slots.n_busy == 0
    assert engine.step() == set()


def test_text_comes_in_whole_characters(engine: Bench) -> None:
    hot = Sampling(temperature=3.0, top_k=0, top_p=1.0, min_p=0.0, seed=3)
    told = engine.ask("Grüße, 日本", 150, hot, n_alternatives=0)
    raw = b"".join(score.piece for piece in told.pieces for score in piece.scores)
    assert told.text == raw.decode("utf-8", errors="replace")
    assert sum(piece.n_tokens for piece in told.pieces) == 150
    emoji = "🎉"
    biased = [(3 + byte, 1000.0 - 100 * i) for i, byte in enumerate(emoji.encode())]
    penalties = Sampling(temperature=0.0, bias=tuple(biased), presence_penalty=500.0)
    told = engine.ask("the", 4, penalties)
    assert [piece.text for piece in told.pieces] == [emoji]
    assert told.pieces[0].n_tokens == 4


def test_stop_texts_end_an_answer(engine: Bench) -> None:
    hot = Sampling(temperature=1.0, seed=5, bias=tuple((3 + byte, -100.0) for byte in range(256)))
    text = engine.ask("the answer", 40, hot).text
    for start in (3, 10):
        stop = text[start : start + 5]  # over several tokens
        told = engine.ask("the answer", 40, hot, stops=(stop, "never"), n_alternatives=1)
        assert told.text == text[: text.index(stop)]
        assert told.reason == "stop"
        scored = b"".join(score.piece for piece in told.pieces for score in piece.scores)
        assert told.text.encode().startswith(scored)


def test_an_answer_that_repeats_itself_ends(engine: Bench) -> None:
    told = engine.ask("the", 200, Sampling(temperature=0.0, bias=((290, 1000.0),)))
    assert told.reason == "loop"


def test_the_models_end_is_not_said(engine: Bench) -> None:
    told = engine.ask("the", 20, Sampling(temperature=0.0, bias=((2, 1000.0),)), n_alternatives=1)
    assert (told.text, told.reason) == ("", "stop")
    assert told.ended is not None
    assert told.ended.n_generated == 0
    assert told.ended.end_score is not None
    assert told.ended.end_score.token == 2


def reference_scores(engine: Bench, tokens: list[int]) -> list[float]:
    model, n = engine.loaded.model, len(tokens)
    with model.context(CONTEXT, n_batch=n, n_outputs=n) as context:
        logits = context.decode(tokens, [True] * n).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    found = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return [float(found[i, token]) for i, token in enumerate(tokens[1:])]


def test_scores_are_those_of_the_model(engine: Bench) -> None:
    beginning = "the answer of the answer, in the end of the answer. " * 2
    for prompt in (beginning + "one", beginning + "two", beginning + "two"):
        told = engine.ask(prompt, 5, n_alternatives=3, scores_prompt=True)
        scores = told.prompt_scores
        assert scores is not None
        drawn = [score for piece in told.pieces for score in piece.scores]
        tokens = [1, *(score.token for score in scores)]
        assert tokens[1:] == engine.loaded.model.tokenize(prompt, special=True)
        right = reference_scores(engine, tokens + [score.token for score in drawn])
        found = [score.logprob for score in scores + drawn]
        assert found == pytest.approx(right, abs=5e-2)  # flash attention adds in half precision
        for score in drawn:  # the likeliest was taken
            assert len(score.alternatives) == 3
            assert score.alternatives[0][0] == score.token
    assert told.n_reused > 40


def test_only_a_prompt_is_scored(engine: Bench) -> None:
    told = engine.ask([5, 6, 7], 0, n_alternatives=0, scores_prompt=True)
    assert told.prompt_scores is not None
    assert [score.token for score in told.prompt_scores] == [5, 6, 7]
    assert told.prompt_scores[0].logprob is None
    assert told.ended == Ended("length", 0)
    assert told.text == ""


def test_a_grammar_is_followed(engine: Bench) -> None:
    grammar = 'root ::= "yes" | "no, " [a-c]+ "."'
    for seed in range(4):
        hot = Sampling(temperature=2.0, seed=seed, grammar=grammar)
        told = engine.ask("the answer", 60, hot)
        assert told.text.startswith(("yes", "no, ")), told.text
        assert set(told.text) <= set("yesno, abc.")
    with pytest.raises(BadGrammar):
        engine.add("the", 5, Sampling(grammar="root ::= ("))


def test_draws_repeat_by_seed(engine: Bench) -> None:
    def draw(seed: int | None) -> str:
        return engine.ask("the answer", 12, Sampling(temperature=1.5, seed=seed)).text

    assert draw(7) == draw(7)
    assert len({draw(None) for _ in range(4)}) > 1


def test_an_answer_that_llama_cpp_fails_at_is_an_error(
    engine: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = engine.add("the answer", 5)
    monkeypatch.setattr(engine.loaded.model.api, "llama_decode", lambda *_: -3)
    engine.finish()
    assert "status -3" in engine.failed[key]
    monkeypatch.undo()
    assert engine.ask("the answer", 5).text


@pytest.mark.parametrize(
    ("a", "b", "n"),
    [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 9], [1, 2, 3], 2), ([4], [5], 0)],
)
def test_common_beginnings(a: list[int], b: list[int], n: int) -> None:
    assert common_length(a, b) == common_length(b, a) == n


def test_the_cache_grows_no_further_than_memory_allows(tiny_gguf: Path) -> None:
    sizes = {}
    for n_ctx in (512, 8192, 100_000):
        with bench(tiny_gguf, n_ctx=n_ctx) as engine:
            sizes[n_ctx] = sum(engine.loaded.facts.memory.values())
    base = read_process().rss - read_process().file
    for memory in (sizes[8192], sizes[512] // 2):
        with bench(tiny_gguf, n_ctx=100_000, memory=base + memory) as engine:
            facts = engine.loaded.facts
            assert engine.loaded.context.n_ctx >= 512
            assert sum(facts.memory.values()) <= max(memory, sizes[512]) * 1.2
            assert engine.ask("the answer", 8).text
