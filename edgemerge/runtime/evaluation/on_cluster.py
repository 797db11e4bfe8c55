"""Scores on a cluster: a worker's task is some questions of one model, or one text.

How questions are cut into batches depends on all of them (`score_questions`), so that any part of them has
the bits of the whole. Another kind of processor rounds otherwise.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgemerge.cluster.connection import Call, Connection, Shared
from edgemerge.errors import ClusterError, EdgemergeError
from edgemerge.runtime.board.processor import processor_fields
from edgemerge.runtime.evaluation.results import Results, sha256_of
from edgemerge.runtime.evaluation.suite import Bar, Request, score_task, score_text
from edgemerge.runtime.llama import Lora, Model
from edgemerge.runtime.model_files import model_files

__all__ = ["Quiz", "run_on_cluster"]

SLICE = 50  # questions of a task


@dataclass(frozen=True)
class Quiz:
    """What workers are to score.

    Attributes
    ----------
    request : Request
        Models, questions and texts.
    hashes : mapping of Path to sequence of str
        SHA-256 of each file of the models, of texts and of adapters.
    gpu_layers : int, optional
        Layers on a GPU.
    loras : tuple of Lora
        Adapters of all models.
    versions : mapping of str to str
        Of what computes.
    """

    request: Request
    hashes: Mapping[Path, Sequence[str]]
    gpu_layers: int | None
    loras: tuple[Lora, ...]
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Part:
    """Questions of a task of a model, by index; without a task, a text that is scored whole."""

    model: int  # its number
    what: int  # number of the task or of the text
    indices: tuple[int, ...] | None
    skip: tuple[int, ...] = ()  # chunks of a text that are scored already


def make_quiz(request: Request, gpu_layers: int | None, loras: tuple[Lora, ...]) -> Quiz:
    """Describe what is to be scored; reads all files."""
    hashes = {path: tuple(map(sha256_of, model_files(path))) for path in request.models}
    others = (*request.texts, *(lora.path for lora in loras))
    hashes |= {path: (sha256_of(path),) for path in others}
    return Quiz(request, hashes, gpu_layers, loras, _find_versions())


def run_on_cluster(
    request: Request,
    results: Results,
    connection: Connection,
    bar: Bar,
    *,
    gpu_layers: int | None,
    loras: tuple[Lora, ...],
) -> tuple[str, ...]:
    """Score all that `results` does not have yet; see `edgemerge.runtime.evaluation.suite.run`.

    Returns
    -------
    notes : tuple of str
        What the user should know of the workers.

    Raises
    ------
    ClusterError
        There is no worker, or one cannot do the work; the sentence names it. Or a link leads elsewhere than
        when the request was made.
    """
    sent = replace(  # workers have other folders to work in
        request,
        models=tuple(path.absolute() for path in request.models),
        texts=tuple(path.absolute() for path in request.texts),
    )
    loras = tuple(replace(lora, path=lora.path.absolute()) for lora in loras)
    quiz = Shared(make_quiz(sent, gpu_layers, loras))
    for path in (*request.models, *request.texts):  # which workers open as they were given
        if request.leads_elsewhere(path):
            raise ClusterError(f"{path} leads to another file than at the start; run it again")
    parts = list(_cut(request, results))
    processors: set[str] = set()

    def note(_none: None, processor: str) -> None:
        processors.add(processor)

    with bar("cluster", "parts") as show:
        done = 0

        def report() -> None:
            show(done, len(parts))

        workers = connection.workers()
        opens = [Call(None, "open", worker) for worker in workers]
        connection.run(open_quiz, quiz, opens, note, report)

        def take(part: Part, found: list[tuple[int, Any]]) -> None:
            nonlocal done
            job = _job(request, part)
            for index, value in found:
                results.add(job, index, value)
            results.flush()
            done += 1

        calls = [Call(part, f"eval {request.models[part.model].stem}") for part in parts]
        connection.run(answer, quiz, calls, take, report)
    if len(processors) > 1:
        kinds = ", ".join(sorted(processors))
        return (f"the workers have different processors, which round differently: {kinds}",)
    return ()


def _cut(request: Request, results: Results) -> Iterator[Part]:
    for model in range(len(request.models)):
        for number, task in enumerate(request.tasks):
            part = Part(model, number, ())
            done = results.entries.setdefault(_job(request, part), {})
            left = [i for i in range(len(task.questions)) if i not in done]
            for at in range(0, len(left), SLICE):
                yield Part(model, number, tuple(left[at : at + SLICE]))
        for number in range(len(request.texts)):
            part = Part(model, number, None)
            done = results.entries.setdefault(_job(request, part), {})
            yield Part(model, number, None, tuple(done))


def _job(request: Request, part: Part) -> str:
    model = request.models[part.model]
    if part.indices is None:
        return request.job_of(model, request.texts[part.what])
    return request.job_of(model, request.tasks[part.what])


def _find_versions() -> dict[str, str]:
    return {name: version(name) for name in ("edgemerge", "llama_cpp_python")}


# -- on a worker --------------------------------------------------------------------------------------


class _Loaded:
    """The model of this process: one at a time, for one task at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._key: object = None
        self._model: Model | None = None

    def get(self, quiz: Quiz, path: Path, threads: int) -> Model:
        key = (path, quiz.hashes[path], quiz.loras, quiz.gpu_layers)
        if self._model is None or key != self._key:
            if self._model is not None:
                self._model.close()
            self._model = None
            _check(quiz, path)
            for lora in quiz.loras:
                _check(quiz, lora.path)
            self._model = Model(
                path, n_threads=threads, n_gpu_layers=quiz.gpu_layers, loras=quiz.loras
            )
            self._key = key
        return self._model


_loaded = _Loaded()


def _check(quiz: Quiz, path: Path) -> None:
    """Refuse a file that is another one than the client's, or is not there."""
    if not path.exists():
        raise ClusterError(f"{path} is not there; put it where all workers see it under this path")
    files = model_files(path) if path in quiz.request.models else [path]
    if tuple(map(sha256_of, files)) != tuple(quiz.hashes[path]):
        raise ClusterError(f"{path} is another file there than here; copy it to that machine")


@contextmanager
def _blaming() -> Iterator[Any]:
    """Name the worker whose error it is."""
    from distributed import get_worker

    worker = get_worker()
    try:
        yield worker
    except (EdgemergeError, OSError) as error:
        raise ClusterError(f"the worker at {worker.address}: {error}") from error


def open_quiz(quiz: Quiz, _argument: None) -> str:
    """Compare versions on the worker that runs this; return its processor."""
    with _blaming():
        own = _find_versions()
        for name, wanted in quiz.versions.items():
            if own[name] != wanted:
                raise ClusterError(f"has {name} {own[name]}, not {wanted}; install the same there")
    fields = processor_fields(Path("/"))
    return fields.get("model name") or fields.get("CPU part", "unknown")


def answer(quiz: Quiz, part: Part) -> list[tuple[int, Any]]:
    """Score a part on the worker that runs this; return what `Results.add` takes."""
    with _blaming() as worker, _loaded.lock:
        model = _loaded.get(quiz, quiz.request.models[part.model], worker.state.nthreads)
        if part.indices is None:
            text = quiz.request.texts[part.what]
            _check(quiz, text)
            return list(score_text(model, text, quiz.request.text_chunk, frozenset(part.skip)))
        task = quiz.request.tasks[part.what]
        skip = frozenset(range(len(task.questions))).difference(part.indices)
        found = score_task(model, task, quiz.request.n_ctx, skip)
        return [one for batch in found for one in batch if one[0] not in skip]
