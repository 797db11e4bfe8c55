"""Run, score, measure and serve a model, each model in a process of its own, and tell how it ended."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

TEXT = "The answer of Müdigkeit 日本, what\n\tis 5?"
SECONDS = 20
MEMORY = 6 << 30


@dataclass(frozen=True)
class Outcome:
    """What became of one model: job -> its end, and the job at which the process died."""

    ends: dict[str, str]
    died: str | None

    @property
    def findings(self) -> list[str]:
        found = [f"{job}: {end}" for job, end in self.ends.items() if end.startswith("traceback")]
        return found + ([f"died in {self.died}"] if self.died else [])


def try_model(path: Path) -> Outcome:
    """Fork, do all jobs, and read what the child could say of each before its end."""
    import_all()
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        _in_child(path, write_end)
    os.close(write_end)
    with os.fdopen(read_end) as told:
        lines = [json.loads(line) for line in told]
    _, status = os.waitpid(pid, 0)
    ends = {job: end for job, end in lines if end is not None}
    begun = [job for job, end in lines if end is None]
    died = None
    if os.WIFSIGNALED(status) or len(ends) < len(begun) or not begun:
        died = f"{begun[-1] if begun else 'the beginning'} with status {status}"
    return Outcome(ends, died)


def import_all() -> None:
    """Import in the parent, once, what every child needs."""
    import edgemerge.runtime.bench.child
    import edgemerge.runtime.engine.process
    import edgemerge.runtime.evaluation.evaluate
    import edgemerge.runtime.evaluation.perplexity
    import edgemerge.runtime.serve.models  # noqa: F401


def _in_child(path: Path, write_end: int) -> None:
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 1)
    if "ODD_RUNS_SHOW" not in os.environ:
        os.dup2(nothing, 2)
    for name, job in JOBS.items():
        os.write(write_end, json.dumps([name, None]).encode() + b"\n")
        os.write(write_end, json.dumps([name, _end_of(job, path)]).encode() + b"\n")
    os._exit(0)


def _end_of(job: Callable[[Path], None], path: Path) -> str:
    from edgemerge.errors import EdgemergeError

    try:
        job(path)
    except EdgemergeError as error:
        said = str(error)
        return f"error: {said}" if said.isprintable() else f"traceback: {said!r}"
    except Exception as error:
        return f"traceback: {type(error).__name__}: {error}"
    return "fine"


def run(path: Path) -> None:
    from edgemerge.runtime.engine.messages import Sampling
    from edgemerge.runtime.generate import Session, read_prompt
    from edgemerge.runtime.llama import Model

    with Model(path, n_threads=1) as model:
        n_ctx = min(64, model.n_ctx_train)
        with Session(model, n_ctx, Sampling(temperature=0.0)) as session:
            list(session.generate(read_prompt(model, TEXT), 3))


def evaluate(path: Path) -> None:
    from edgemerge.runtime.evaluation.evaluate import evaluate as score
    from edgemerge.runtime.evaluation.questions import Question
    from edgemerge.runtime.llama import Model

    with Model(path, n_threads=1) as model:
        score(model, [Question(TEXT, (" ja", " nein"), 0)])


def perplexity(path: Path) -> None:
    from edgemerge.runtime.evaluation.perplexity import cut_text, perplexity_of, score_chunks
    from edgemerge.runtime.llama import Model

    text = path.with_suffix(".txt")
    text.write_text(TEXT * 8)
    with Model(path, n_threads=1) as model:
        perplexity_of(chunk for _, chunk in score_chunks(model, cut_text(model, text, 32)))


def bench(path: Path) -> None:
    from edgemerge.runtime.bench.bench import BenchSettings
    from edgemerge.runtime.bench.child import measure

    settings = BenchSettings(threads=(1,), n_prompt=8, n_gen=2, repetitions=1)
    measure(lambda *_: None, path, asdict(settings))


def serve(path: Path) -> None:
    """Ask the model's own process; where it dies, so does this one, as it would have without."""
    import asyncio

    from edgemerge.runtime.engine.messages import Generation
    from edgemerge.runtime.engine.options import EngineOptions
    from edgemerge.runtime.engine.process import EngineFailure, ModelProcess
    from edgemerge.runtime.serve.models import read_model_file

    async def ask() -> None:
        file = read_model_file(path, 64)
        process = ModelProcess(EngineOptions(file.path, n_ctx=64, n_sequences=2, n_threads=1))
        await process.start()

        async def complete() -> None:
            wanted = Generation(TEXT, 3, n_alternatives=2, scores_prompt=True)
            async for _ in process.generate(wanted):
                pass

        async def write() -> None:
            await process.detokenize(await process.tokenize(TEXT, add_special=True))

        for request in (complete, lambda: process.embed([TEXT]), write):
            try:
                await request()
            except EngineFailure as failure:  # 400 and 500 are answers: the server goes on
                if failure.status == 503:
                    os.abort()
        await process.close()

    asyncio.run(ask())


JOBS: dict[str, Callable[[Path], None]] = {
    "run": run,
    "eval": evaluate,
    "perplexity": perplexity,
    "bench": bench,
    "serve": serve,
}


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(argument, try_model(Path(argument)))
