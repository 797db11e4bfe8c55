"""The process in which a model is measured; started by `edgemerge.runtime.bench.bench` and by nobody else.

A job comes as a line of JSON on standard input; lines go to standard output, as `bench` says.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from edgemerge.errors import EdgemergeError, RuntimeFailure
from edgemerge.runtime.bench.bench import BenchSettings, Measured
from edgemerge.runtime.bench.heat import HeatWatch
from edgemerge.runtime.bench.load_time import load_timed
from edgemerge.runtime.bench.messages import read_message, rebuild, write_message
from edgemerge.runtime.bench.peak_memory import PeakMemory
from edgemerge.runtime.bench.speed import measure_speed
from edgemerge.runtime.board.device import open_power_meter
from edgemerge.runtime.evaluation.evaluate import Score, evaluate
from edgemerge.runtime.evaluation.questions import Question
from edgemerge.runtime.llama import Model
from edgemerge.runtime.model_files import model_files

__all__ = ["main"]

Say = Callable[..., None]


def load(
    say: Say, path: Path, n_threads: int, n_gpu_layers: int | None, rpc: Sequence[str]
) -> float:
    """Seconds that loading takes."""
    model, seconds = load_timed(path, n_threads=n_threads, n_gpu_layers=n_gpu_layers, rpc=rpc)
    model.close()
    return seconds


def measure(say: Say, path: Path, stated: Mapping[str, Any]) -> Measured:
    """Run all tests of a `BenchSettings`."""
    settings = rebuild(BenchSettings, stated)
    peak = PeakMemory(model_files(path))
    say("step", "warm load")
    with ExitStack() as stack:
        model, seconds = load_timed(
            path,
            n_threads=max(settings.threads),
            n_gpu_layers=settings.n_gpu_layers,
            rpc=settings.rpc,
        )
        stack.enter_context(model)
        _check_context(model, settings)
        meter = open_power_meter()
        if meter is not None:
            stack.enter_context(meter)
        speeds = []
        with HeatWatch() as watch:
            for test in settings.tests():
                say("step", f"{test.name}, {test.n_threads} thread{'s' * (test.n_threads > 1)}")
                speeds.append(
                    measure_speed(model, test, settings.repetitions, meter=meter, on_end=peak.look)
                )
        return Measured(
            description=model.description,
            n_params=model.n_params,
            n_bytes=model.n_bytes,
            backend="RPC" if settings.rpc else _backend(model),
            load_seconds=seconds,
            speeds=tuple(speeds),
            memory=peak.split,
            heat=watch.heat,
            meter=None if meter is None else f"{meter.name}: {meter.covers}",
        )


def score(
    say: Say,
    path: Path,
    n_threads: int,
    n_gpu_layers: int | None,
    rpc: Sequence[str],
    stated: Sequence[Mapping[str, Any]],
) -> Score:
    """Accuracy on questions."""
    questions = [rebuild(Question, question) for question in stated]
    with Model(path, n_threads=n_threads, n_gpu_layers=n_gpu_layers, rpc=rpc) as model:
        return evaluate(model, questions)


JOBS: dict[str, Callable[..., Any]] = {"load": load, "measure": measure, "score": score}


def _check_context(model: Model, settings: BenchSettings) -> None:
    longest = settings.depth + max(settings.n_prompt, settings.n_gen)
    if longest > model.n_ctx_train:
        raise RuntimeFailure(
            f"{model.path}: the tests need a context of {longest} tokens and this model's is "
            f"{model.n_ctx_train}: give a smaller -p, -n or --depth"
        )


def _backend(model: Model) -> str:
    """Name what llama.cpp was built for, as llama-bench does: ggml's backends but the CPU's."""
    ggml = model.api.llama_cpp._lib
    ggml.ggml_backend_reg_count.restype = ctypes.c_size_t
    ggml.ggml_backend_reg_get.restype = ctypes.c_void_p
    ggml.ggml_backend_reg_get.argtypes = [ctypes.c_size_t]
    ggml.ggml_backend_reg_name.restype = ctypes.c_char_p
    ggml.ggml_backend_reg_name.argtypes = [ctypes.c_void_p]
    names = [
        ggml.ggml_backend_reg_name(ggml.ggml_backend_reg_get(i)).decode()
        for i in range(ggml.ggml_backend_reg_count())
    ]
    return ",".join(name for name in names if name not in ("CPU", "RPC")) or "CPU"


def main() -> None:
    """Do the job that is asked for on standard input."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # the parent hears Ctrl-C too, and ends this process
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the lines

    def say(*message: Any) -> None:
        write_message(out, *message)

    asked = read_message(sys.stdin.buffer)
    if asked is None:  # the parent is gone
        return
    job, path, *arguments = asked
    try:
        result = JOBS[job](say, Path(path), *arguments)
    except EdgemergeError as error:
        say("failure", str(error), getattr(error, "detail", ""))
    except MemoryError:
        say("failure", f"{path}: out of memory: give a smaller -p and --depth", "")
    else:
        say("done", result)


if __name__ == "__main__":
    main()
