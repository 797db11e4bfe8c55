"""Measure models: speed, latency, load time, memory, energy and heat, each model in fresh processes.

Fresh, because the peak of a process's memory only grows, because a library that is loaded once keeps what it
has learnt, and because a crash of llama.cpp must not take the other models' figures with it.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from edgemerge.errors import RuntimeFailure
from edgemerge.runtime.bench.heat import Heat
from edgemerge.runtime.bench.load_time import LoadTime, drop_cache
from edgemerge.runtime.bench.messages import read_message, rebuild, write_message
from edgemerge.runtime.bench.peak_memory import MemorySplit
from edgemerge.runtime.bench.speed import Speed, SpeedTest
from edgemerge.runtime.evaluation.evaluate import Score
from edgemerge.runtime.evaluation.questions import Question
from edgemerge.runtime.model_files import model_files
from edgemerge.runtime.rpc.loss import read_last_words

__all__ = ["BenchSettings", "Measured", "ModelBench", "bench_model"]

Steps = Callable[[str], None]
T = TypeVar("T")

_LOG_BYTES = 4000  # of what a child wrote before it died


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """What to measure.

    Attributes
    ----------
    threads : tuple of int
        Numbers of threads, each of which is measured.
    n_prompt, n_gen : int
        Tokens to read and to generate; 0 leaves that test out.
    repetitions : int
        Of each test, at least 1.
    depth : int
        Tokens in the cache before each test.
    n_gpu_layers : int or None
        Layers on the GPU; None for all, where llama.cpp was built for one.
    rpc : tuple of str
        `ADDRESS:PORT` of rpc workers that compute the layers.
    """

    threads: tuple[int, ...]
    n_prompt: int = 512
    n_gen: int = 128
    repetitions: int = 3
    depth: int = 0
    n_gpu_layers: int | None = None
    rpc: tuple[str, ...] = ()

    def tests(self) -> list[SpeedTest]:
        """Tests in the order in which they run: that of llama-bench."""
        kinds = [(self.n_prompt, 0), (0, self.n_gen)]
        return [
            SpeedTest(n_prompt, n_gen, self.depth, n_threads)
            for n_threads in self.threads
            for n_prompt, n_gen in kinds
            if n_prompt or n_gen
        ]


@dataclass(frozen=True, slots=True)
class Measured:
    """What one process found out about a model.

    Attributes
    ----------
    description : str
        What llama.cpp calls the model, e.g. `llama 256M Q4_1`.
    n_params, n_bytes : int
        Of the model; bytes of its tensors.
    backend : str
        CPU, or the GPU's kind, as llama-bench names it.
    load_seconds : float
        Until the model had answered to one token.
    speeds : tuple of Speed
        One per test.
    memory : MemorySplit
        At the peak over all tests.
    heat : Heat
        Over all tests.
    meter : str or None
        Where energy comes from and what it covers; None where the board reports none.
    """

    description: str
    n_params: int
    n_bytes: int
    backend: str
    load_seconds: float
    speeds: tuple[Speed, ...]
    memory: MemorySplit
    heat: Heat
    meter: str | None


@dataclass(frozen=True, slots=True)
class ModelBench:
    """All that was measured of a model."""

    path: Path
    settings: BenchSettings
    measured: Measured
    load: LoadTime
    score: Score | None


def bench_model(
    path: Path,
    settings: BenchSettings,
    *,
    questions: Sequence[Question] | None = None,
    on_step: Steps | None = None,
) -> ModelBench:
    """Measure a model in processes of its own: a cold load, then the tests, then its accuracy.

    Parameters
    ----------
    path : Path
        A GGUF file; of a split model, the first part.
    settings : BenchSettings
        What to measure.
    questions : sequence of Question, optional
        Multiple-choice questions for the accuracy.
    on_step : callable, optional
        Told in a few words what is being done.

    Raises
    ------
    RuntimeFailure
        There is no such file, llama.cpp refuses it, the tests exceed its context, or llama.cpp crashed.
    """
    say = on_step or (lambda text: None)
    n_threads = max(settings.threads)
    say("cold load")
    note = drop_cache(model_files(path))
    where = (n_threads, settings.n_gpu_layers, settings.rpc)
    cold = _in_child("load", path, say, float, *where)
    measured = _in_child("measure", path, say, Measured, settings)
    score = None
    if questions is not None:
        say(f"{len(questions)} questions")
        score = _in_child("score", path, say, Score, *where, questions)
    load = LoadTime(measured.load_seconds, None if note else cold, note)
    return ModelBench(path, settings, measured, load, score)


def _in_child(job: str, path: Path, say: Steps, kind: type[T], *arguments: Any) -> T:
    """Run a job of `child` in a fresh process and return what it found.

    The child writes messages to its standard output: ("step", text) as it goes on, and as its last either
    ("done", result) or ("failure", message, detail).
    """
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "edgemerge.runtime.bench.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            # where it is dead already, its silence and its log tell
            with suppress(BrokenPipeError), child.stdin as pipe:
                write_message(pipe, job, str(path), *arguments)
            message = _follow(child.stdout, say)
            child.wait()
        finally:
            child.kill()  # where this was interrupted; nothing to a child that has ended
            child.wait()
            child.stdout.close()
        log.seek(0)
        written = log.read()[-_LOG_BYTES:].decode("utf-8", errors="replace").strip()
    if message is None and (lost := read_last_words(written)):
        raise RuntimeFailure(f"{path}: while it was measured, {lost}")
    if message is None:
        raise RuntimeFailure(_death(path, child.returncode), detail=written)
    if message[0] == "failure":
        raise RuntimeFailure(message[1], detail=message[2])
    return rebuild(kind, message[1])


def _follow(pipe: IO[bytes], say: Steps) -> list[Any] | None:
    """Pass a child's steps on; its last word, or None if it died without one."""
    while (message := read_message(pipe)) and message[0] == "step":
        say(message[1])
    return message


def _death(path: Path, status: int) -> str:
    if status == -signal.SIGKILL:
        return (
            f"{path}: the system stopped the measurement, as it does when memory is short: "
            "close other programs, or give a smaller -p and --depth"
        )
    how = signal.Signals(-status).name if status < 0 else f"exit code {status}"
    return (
        f"{path}: the measurement died ({how}), most likely because llama.cpp crashed: "
        "check the file with edgemerge inspect, and try fewer --gpu-layers if there is a GPU"
    )
