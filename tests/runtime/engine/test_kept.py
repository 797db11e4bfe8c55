"""What was computed before: kept outside of the cache, and taken over from there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.engine.test_scheduler import PROMPTS, alone, bench
from tests.support.odd_kinds import write_kind

pytestmark = pytest.mark.llama

LONG = "the answer of the answer in the end, "


def test_what_was_put_away_comes_back(tiny_gguf: Path) -> None:
    with bench(tiny_gguf, n_ctx=4096, flash=False) as engine:
        plain = engine.ask(LONG * 4 + "one", 8).text
        for i in range(5):
            engine.ask(f"{i} other " * 20, 8)
        in_cache = [slot for slot in engine.loaded.slots if slot.tokens]
        assert len(in_cache) == 1  # attention looks at all that is there
        told = engine.ask(LONG * 4 + "one", 8)
        assert told.n_reused == told.begun.n_prompt - 1  # type: ignore[union-attr]
        assert told.text == plain
        # and a part of it, for a prompt that goes on in another way
        told = engine.ask(LONG * 4 + "two", 8)
        assert told.n_reused > 100
        texts = alone(tiny_gguf, [LONG * 4 + "two"], 8, flash=False)
        assert [told.text] == texts


def test_scores_come_back_with_it(tiny_gguf: Path) -> None:
    def ask(i: int, n_alternatives: int = 2) -> tuple[int, list[float | None]]:
        told = engine.ask(f"{i}, " + LONG * 3, 0, n_alternatives=n_alternatives, scores_prompt=True)
        assert told.prompt_scores is not None
        return told.n_reused, [score.logprob for score in told.prompt_scores]

    with bench(tiny_gguf, n_ctx=4096, flash=False) as engine:
        _, right = ask(0)
        for i in range(1, 6):
            ask(i)
        n_reused, found = ask(0)
        assert n_reused > 80
        assert found == pytest.approx(right, abs=1e-3)
        n_reused, found = ask(0, 1)  # those have other alternatives
        assert n_reused == 0
        assert found == pytest.approx(right, abs=1e-3)


def test_the_store_is_bounded(tiny_gguf: Path) -> None:
    with bench(tiny_gguf, n_ctx=512) as engine:
        most = engine.loaded.facts.memory["kept"]
        for i in range(20):
            engine.ask(f"{i} other " * 20, 8)
        assert 0 < engine.loaded.slots.store.n_bytes <= most


def test_it_is_copied_out_after_its_end_was_told(tiny_gguf: Path) -> None:
    with bench(tiny_gguf, n_ctx=4096) as engine:
        slots = engine.loaded.slots
        engine.ask(LONG * 4 + "one", 8)
        assert slots.store.n_bytes == 0
        engine.scheduler.tidy()
        n_bytes = slots.store.n_bytes
        assert n_bytes > 0
        assert (
            sum(bool(slot.tokens) for slot in slots) == 1
        )  # who goes on with it finds it in the cache
        engine.add("the", 40)
        engine.step()
        assert slots.store.n_bytes == n_bytes  # it was not copied again
        assert sum(bool(slot.tokens) for slot in slots) == 1
        ending = engine.add(LONG * 3, 1)
        while not engine.told[ending].ended:
            engine.step()
        assert sum(bool(slot.tokens) for slot in slots) == 2
        engine.scheduler.tidy()
        assert sum(bool(slot.tokens) for slot in slots) == 1


@pytest.mark.parametrize("kind", ["mamba", "falcon-h1", "lfm2 moe", "gpt-oss"])
def test_other_kinds_of_memory(kind: str, tmp_path: Path) -> None:
    """A running state can neither be cut back nor be taken over in part; sliding windows can."""
    path = write_kind(kind, tmp_path)[0]
    prompts = [*PROMPTS[:4], LONG * 2]
    texts = alone(path, prompts, 12, n_sequences=3)
    with bench(path, n_sequences=3) as engine:
        keys = [engine.add(prompt, 12) for prompt in prompts]
        engine.finish()
        assert [engine.told[key].text for key in keys] == texts
        for _ in range(2):
            assert engine.ask(LONG * 2, 12).text == texts[-1]
            assert engine.ask(prompts[0], 12).text == texts[0]
