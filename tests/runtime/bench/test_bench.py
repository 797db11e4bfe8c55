from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgemerge.errors import FormatError, RuntimeFailure
from edgemerge.runtime.bench.bench import BenchSettings, bench_model
from edgemerge.runtime.evaluation.evaluate import evaluate
from edgemerge.runtime.evaluation.questions import Question
from edgemerge.runtime.llama import Model
from tests.support.tiny_gguf import CONTEXT

pytestmark = pytest.mark.llama

QUICK = BenchSettings(threads=(1,), n_prompt=16, n_gen=4, repetitions=2)


def test_tests_come_in_the_order_of_llama_bench() -> None:
    settings = BenchSettings(threads=(1, 2), n_prompt=8, n_gen=4, depth=2)
    assert [(test.name, test.n_threads) for test in settings.tests()] == [
        ("pp8 @ d2", 1),
        ("tg4 @ d2", 1),
        ("pp8 @ d2", 2),
        ("tg4 @ d2", 2),
    ]
    assert [test.name for test in BenchSettings(threads=(1,), n_prompt=0).tests()] == ["tg128"]


def test_a_model_is_measured(tiny_gguf: Path) -> None:
    steps: list[str] = []
    questions = [Question(f"Question: {x}\nAnswer:", ("the", "answer in", "on"), 1) for x in "abcd"]
    found = bench_model(tiny_gguf, QUICK, questions=questions, on_step=steps.append)
    assert steps == ["cold load", "warm load", "pp16, 1 thread", "tg4, 1 thread", "4 questions"]
    measured = found.measured
    assert [speed.test.name for speed in measured.speeds] == ["pp16", "tg4"]
    assert all(speed.mean > 0 for speed in measured.speeds)
    assert [len(speed.latencies_ns) for speed in measured.speeds] == [20, 8]
    assert measured.backend == "CPU"
    assert measured.description.startswith("llama")
    assert found.load.warm > 0
    assert (found.load.cold is None) == bool(found.load.note)
    with Model(tiny_gguf, n_threads=1) as model:
        assert (measured.n_params, measured.n_bytes) == (model.n_params, model.n_bytes)
        expected = evaluate(model, questions)
    assert found.score == expected


def test_tests_beyond_the_context_are_refused(tiny_gguf: Path) -> None:
    settings = BenchSettings(threads=(1,), n_prompt=CONTEXT - 7, n_gen=1, depth=8)
    with pytest.raises(RuntimeFailure) as caught:
        bench_model(tiny_gguf, settings)
    assert str(caught.value) == (
        f"{tiny_gguf}: the tests need a context of {CONTEXT + 1} tokens and this model's is "
        f"{CONTEXT}: give a smaller -p, -n or --depth"
    )


def test_a_bad_file_is_named_before_llama_cpp_sees_it(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"no model at all")
    with pytest.raises(FormatError, match=r"bad\.gguf: is not a GGUF file"):
        bench_model(path, QUICK)


@pytest.mark.parametrize(
    ("last_act", "sentence"),
    [
        (
            "cat >/dev/null; kill -SEGV $$",
            r"the measurement died \(SIGSEGV\), most likely because llama\.cpp crashed",
        ),
        ("exit 3", r"the measurement died \(exit code 3\)"),
        (
            "cat >/dev/null; kill -KILL $$",
            "the system stopped the measurement, as it does when memory is short",
        ),
    ],
)
def test_a_crash_is_one_sentence_that_names_the_model(
    tmp_path: Path,
    tiny_gguf: Path,
    monkeypatch: pytest.MonkeyPatch,
    last_act: str,
    sentence: str,
) -> None:
    child = tmp_path / "child"
    child.write_text(f"#!/bin/sh\necho GGML_ASSERT failed >&2\n{last_act}\n")
    child.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(child))
    with pytest.raises(RuntimeFailure, match=f"tiny.gguf: {sentence}") as caught:
        bench_model(tiny_gguf, QUICK)
    assert caught.value.detail == "GGML_ASSERT failed"


def test_an_interruption_ends_the_child(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def keep(*arguments: Any, **words: Any) -> subprocess.Popen[bytes]:
        children.append(start(*arguments, **words))
        return children[-1]

    def interrupt(step: str) -> None:
        if step.startswith("pp"):
            raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", keep)
    with pytest.raises(KeyboardInterrupt):
        bench_model(tiny_gguf, QUICK, on_step=interrupt)
    assert len(children) == 2
    assert all(child.returncode is not None for child in children)
