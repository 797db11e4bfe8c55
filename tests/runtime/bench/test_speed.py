from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgemerge.runtime.bench import speed as speed_module
from edgemerge.runtime.bench.speed import Speed, SpeedTest, measure_speed
from edgemerge.runtime.library import Buffers
from edgemerge.runtime.llama import Context, Model

pytestmark = pytest.mark.llama


@pytest.fixture(scope="module")
def model(tiny_gguf: Path) -> Iterator[Model]:
    with Model(tiny_gguf, n_threads=1) as loaded:
        yield loaded


@pytest.fixture
def contexts(monkeypatch: pytest.MonkeyPatch, model: Model) -> list[Context]:
    """The contexts that are made from here on."""
    made: list[Context] = []
    make = model.context

    def keep(*arguments: Any, **words: Any) -> Context:
        made.append(make(*arguments, **words))
        return made[-1]

    monkeypatch.setattr(model, "context", keep)
    return made


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch, model: Model) -> list[list[int]]:
    """The tokens of each call of llama_decode from here on; the last one alone has logits."""
    seen: list[list[int]] = []
    decode = model.api.llama_decode

    def keep(context: object, batch: Any) -> object:
        assert batch.logits[: batch.n_tokens] == [0] * (batch.n_tokens - 1) + [1]
        seen.append(batch.token[: batch.n_tokens])
        return decode(context, batch)

    monkeypatch.setattr(model.api, "llama_decode", keep)
    return seen


def test_tests_have_the_names_of_llama_bench() -> None:
    assert SpeedTest(512, 0, 0, 4).name == "pp512"
    assert SpeedTest(0, 128, 1024, 4).name == "tg128 @ d1024"


def test_figures_of_a_test() -> None:
    tokens = tuple(range(1_000_000, 101_000_000, 1_000_000))  # 1 to 100 ms
    speed = Speed(SpeedTest(0, 50, 0, 2), "", (2_000_000_000, 4_000_000_000), tokens, 9, 25.0)
    assert speed.rates == [25.0, 12.5]
    assert speed.mean == 18.75
    assert speed.deviation == pytest.approx(statistics.stdev([25.0, 12.5]))
    assert speed.mean_ns == 3e9
    assert speed.latency(50) == pytest.approx(0.0505)
    assert speed.latency(95) == pytest.approx(0.09505)
    assert speed.joules_per_token == 0.25
    alone = Speed(SpeedTest(0, 50, 0, 2), "", (5,), tokens, 9, None)
    assert (alone.deviation, alone.deviation_ns, alone.joules_per_token) == (0.0, 0.0, None)


def test_a_prompt_is_cut_into_batches_and_begins_with_bos(
    monkeypatch: pytest.MonkeyPatch, model: Model, batches: list[list[int]]
) -> None:
    monkeypatch.setattr(speed_module, "N_BATCH", 32)
    monkeypatch.setattr(speed_module, "_PROMPTS", 0)
    speed = measure_speed(model, SpeedTest(80, 0, 0, 1), 2)
    assert [len(batch) for batch in batches] == [32, 32, 16] * 3  # one run to warm up
    assert all(batch[0] == model.bos[0] for batch in batches[::3])
    assert all(0 <= token < model.n_vocab for batch in batches for token in batch)
    assert len(speed.samples_ns) == len(speed.latencies_ns) == 2
    assert speed.samples_ns == speed.latencies_ns


def test_each_repetition_starts_at_its_depth(
    model: Model, batches: list[list[int]], contexts: list[Context]
) -> None:
    ends = []

    def look(buffers: Buffers) -> None:
        assert buffers is contexts[-1].buffers
        memory = model.api.llama_get_memory(contexts[-1].handle)
        ends.append(model.api.llama_memory_seq_pos_max(memory, 0))

    speed = measure_speed(model, SpeedTest(0, 8, 40, 1), 3, on_end=look)
    assert ends == [40 + 8 - 1]
    assert [len(batch) for batch in batches] == [1, *[40, *[1] * 8] * 3]
    assert len(speed.latencies_ns) == 3 * 8
    assert sum(speed.latencies_ns) <= sum(speed.samples_ns) <= 1.5 * sum(speed.latencies_ns) + 1e6
    assert contexts[-1].n_ctx >= 48


def test_quick_prompts_are_repeated_for_their_percentiles(model: Model) -> None:
    speed = measure_speed(model, SpeedTest(16, 0, 0, 1), 2)
    assert len(speed.samples_ns) == 2
    assert len(speed.latencies_ns) == 20


def test_slow_prompts_are_not(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    monkeypatch.setattr(speed_module, "_PROMPT_SECONDS", 0.0)
    assert len(measure_speed(model, SpeedTest(16, 0, 0, 1), 2).latencies_ns) == 2


def test_energy_is_counted_over_the_repetitions_alone(model: Model) -> None:
    class Meter:
        def __init__(self) -> None:
            self.calls = 0

        def joules(self) -> float:
            self.calls += 1
            return float(self.calls**2)  # 1, 4, 9, 16: repetitions take 3 and 7

    speed = measure_speed(model, SpeedTest(0, 4, 0, 1), 2, meter=Meter())  # type: ignore[arg-type]
    assert speed.joules == 10.0


def raw_seconds(model: Model, n_prompt: int, n_gen: int) -> float:
    """What llama-bench's test_prompt or test_gen does, with llama_cpp alone."""
    api = model.api
    params = api.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = n_prompt + n_gen, 2048, 512
    params.n_threads = params.n_threads_batch = 1
    context = api.llama_init_from_model(model._handle, params)
    try:
        tokens = (ctypes.c_int32 * (n_prompt + n_gen))(*range(3, 3 + n_prompt + n_gen))
        times = []
        for _ in range(5):
            api.llama_memory_clear(api.llama_get_memory(context), False)
            start = time.perf_counter()
            for i in range(n_gen):
                one = ctypes.cast(ctypes.byref(tokens, 4 * i), ctypes.POINTER(ctypes.c_int32))
                assert api.llama_decode(context, api.llama_batch_get_one(one, 1)) == 0
                api.llama_synchronize(context)
            if n_prompt:
                assert api.llama_decode(context, api.llama_batch_get_one(tokens, n_prompt)) == 0
                api.llama_synchronize(context)
            times.append(time.perf_counter() - start)
        return min(times)
    finally:
        api.llama_free(context)


@pytest.mark.parametrize(("n_prompt", "n_gen"), [(200, 0), (0, 100)])
def test_rates_are_those_of_raw_calls(
    monkeypatch: pytest.MonkeyPatch, model: Model, n_prompt: int, n_gen: int
) -> None:
    """The best of interleaved runs; a busy machine gets more tries."""
    monkeypatch.setattr(speed_module, "_PROMPTS", 0)
    ours, raw = [], []
    for _ in range(12):
        raw.append(raw_seconds(model, n_prompt, n_gen))
        ours.append(min(measure_speed(model, SpeedTest(n_prompt, n_gen, 0, 1), 5).samples_ns) / 1e9)
        if len(ours) >= 3 and min(ours) == pytest.approx(min(raw), rel=0.25):
            return
    pytest.fail(f"ours {np.sort(ours)[:3]} s, raw {np.sort(raw)[:3]} s")
