"""Asks a model all questions and texts of a site, in a process of its own, and keeps the answers.

llama.cpp may end the process, or compute NaN: then only the model that was asked is to blame. No model is
where the system or somebody ends it, as where memory is short: the next update asks again. Answers lie in
`answers/ID-DIGEST.json`, where the digest is of all that they depend on. So the model that serves is asked
once for the same questions. A run that was cut off goes on after the last batch.
The child is `python -m edgemerge.fleet.examination`; it ends with its parent.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from edgemerge.errors import FormatError, RuntimeFailure
from edgemerge.fleet.ingredients import FileHashes
from edgemerge.fleet.promotion import Talk
from edgemerge.fleet.site_file import Rule, Site
from edgemerge.formats.gguf.metadata import get_value
from edgemerge.formats.gguf.model import GgufModel
from edgemerge.formats.json_file import read_object
from edgemerge.runtime.child_end import describe_end, is_crash
from edgemerge.runtime.evaluation.answers import Answers
from edgemerge.runtime.evaluation.evaluate import Mark
from edgemerge.runtime.evaluation.likelihood import NoNumbers
from edgemerge.runtime.evaluation.perplexity import Chunk
from edgemerge.runtime.evaluation.suite import CHUNK
from edgemerge.runtime.smoke import QUESTIONS, ask_aside
from edgemerge.site.folder import SiteFolder

__all__ = ["Crash", "Examiner", "LlamaExaminer", "common_chunk"]

PR_SET_PDEATHSIG = 1
MAX_ANSWERS = 1 << 28  # bytes of a file of answers
MAX_VALUES = 20_000_000

Show = Callable[[str, int, int], None]


class Crash(RuntimeFailure):
    """The model that was asked is to blame: llama.cpp ended its process, or computes NaN with it."""


class Examiner(Protocol):
    """What asks models."""

    def ask_all(self, model: Path, sha256: str, show: Show, chunk: int) -> Answers:
        """Ask a model all questions, and texts in chunks of so many tokens; answers that are kept are taken.

        Raises
        ------
        Crash
            llama.cpp ended its process, or computes NaN or infinity.
        EdgemergeError
            The model cannot be asked, or the questions are not as they should be.
        """

    def talk(self, model: Path) -> Talk:
        """Ask a model the smoke question; what goes wrong with it is the answer's `problem`.

        Raises
        ------
        RuntimeFailure
            The process that asks was ended, or took too long: no model is to blame.
        """


class LlamaExaminer:
    """Asks by llama.cpp.

    Parameters
    ----------
    site : Site
        With the questions.
    folder : SiteFolder
        Where answers are kept.
    hashes : FileHashes
        Of the files of questions.
    """

    def __init__(self, site: Site, folder: SiteFolder, hashes: FileHashes) -> None:
        self._site, self._folder, self._hashes = site, folder, hashes

    def ask_all(self, model: Path, sha256: str, show: Show, chunk: int) -> Answers:
        """Ask a model all questions; see `Examiner`."""
        header = {**self._header(sha256), "chunk": chunk}
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:12]
        output = self._folder.answers / f"{sha256[:16]}-{digest}.json"
        if not output.exists():
            self._run(model, header, output, show)
        return _read_answers(output)

    def talk(self, model: Path) -> Talk:
        """Ask a model the smoke question; see `Examiner`."""
        return talk_aside(model, self._site.rule, self._site.threads)

    def _header(self, sha256: str) -> dict[str, Any]:
        from importlib.metadata import version

        return {
            "edgemerge": version("edgemerge"),
            "llama_cpp_python": version("llama_cpp_python"),
            "model": sha256,
            "questions": {name: self._hashes.of(p) for name, p in self._site.questions.items()},
            "texts": {name: self._hashes.of(path) for name, path in self._site.texts.items()},
        }

    def _run(self, model: Path, header: Mapping[str, Any], output: Path, show: Show) -> None:
        order = {
            "parent": os.getpid(),
            "model": str(model),
            "questions": {name: str(path) for name, path in self._site.questions.items()},
            "texts": {name: str(path) for name, path in self._site.texts.items()},
            "threads": self._site.threads,
            "header": dict(header),
            "output": str(output),
        }
        with subprocess.Popen(
            [sys.executable, "-P", "-m", "edgemerge.fleet.examination"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        ) as child:
            try:
                problem = _listen(child, order, show)
            finally:
                child.kill()
        if problem is not None:
            raise problem
        if output.exists():
            return
        if is_crash(child.returncode):
            raise Crash(
                f"{model}: llama.cpp ended the process in which it was asked the questions; see whether "
                "the model runs with edgemerge run"
            )
        raise _put_off(model, f"the process in which it was asked {describe_end(child.returncode)}")


def common_chunk(models: Iterable[Path]) -> int:
    """Return tokens of a chunk of a text that all models can read: 512, or their shortest context.

    Parameters
    ----------
    models : iterable of Path
        GGUF files.
    """
    return min((CHUNK, *(filter(None, map(_context_of, models)))))


def _context_of(model: Path) -> int | None:
    with closing(GgufModel(model)) as source:
        stated = get_value(source.metadata(), f"{source.architecture}.context_length")
    return stated if isinstance(stated, int) else None


def talk_aside(model: Path, rule: Rule, n_threads: int | None) -> Talk:
    """Ask a model the smoke question in a child, and another one for its speed.

    Raises
    ------
    RuntimeFailure
        As of `Examiner.talk`.
    """
    first = rule.ask or QUESTIONS[0]
    answers = ask_aside([model], (first, QUESTIONS[1]), n_threads)
    if answers[0].problem is not None and not answers[0].blames_model:
        raise _put_off(model, answers[0].problem)
    speeds = [one.speed for one in answers if one.speed is not None]
    return Talk(answers[0], max(speeds, default=None))


def _put_off(model: Path, why: str) -> RuntimeFailure:
    return RuntimeFailure(f"{model}: {why}; the next update asks it again")


def _listen(child: subprocess.Popen[str], order: object, show: Show) -> RuntimeFailure | None:
    """Give a child its order, and hear of its progress until it ends; return what it could not do."""
    assert child.stdin is not None
    assert child.stdout is not None
    with suppress(BrokenPipeError):  # it has ended
        child.stdin.write(json.dumps(order))
    with suppress(BrokenPipeError):
        child.stdin.close()
    problem = None
    for line in child.stdout:
        said = json.loads(line)
        if "problem" in said:
            problem = (Crash if said["of_model"] else RuntimeFailure)(said["problem"])
        else:
            show(said["what"], said["done"], said["total"])
    child.wait()
    return problem


def _read_answers(path: Path) -> Answers:
    document = read_object(path, max_bytes=MAX_ANSWERS, max_values=MAX_VALUES)
    try:
        return Answers(
            {name: [Mark(*one) for one in marks] for name, marks in document["marks"].items()},
            {name: [Chunk(*one) for one in chunks] for name, chunks in document["chunks"].items()},
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise FormatError("holds no answers of a model; remove it", path=path) from error


# -- the child ---------------------------------------------------------------------------------------


def _main() -> None:
    """Do what stands on standard input; say on standard output how far it is."""
    order = json.load(sys.stdin)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != order["parent"]:  # it ended before this was said
        return
    from edgemerge.errors import EdgemergeError

    try:
        _examine(order)
    except EdgemergeError as error:
        _say(problem=str(error), of_model=isinstance(error, NoNumbers))


def _say(**facts: Any) -> None:
    sys.stdout.write(f"{json.dumps(facts)}\n")
    sys.stdout.flush()


def _examine(order: Mapping[str, Any]) -> None:
    from contextlib import contextmanager

    from edgemerge.runtime.evaluation import suite
    from edgemerge.runtime.evaluation.results import ResultsFile
    from edgemerge.runtime.evaluation.tasks import read_task
    from edgemerge.runtime.llama import Model

    @contextmanager
    def bar(label: str, _unit: str) -> Any:
        yield lambda done, total: _say(what=label, done=done, total=total)

    model = Path(order["model"])
    tasks = {name: read_task(name, path) for name, path in order["questions"].items()}
    texts = {name: Path(path) for name, path in order["texts"].items()}
    asked = suite.Request(
        (model,), tuple(tasks.values()), tuple(texts.values()), None, order["header"]["chunk"]
    )
    with ResultsFile(Path(order["output"]), order["header"], force=True) as results:
        suite.run(asked, results, lambda path: Model(path, n_threads=order["threads"]), bar)
        marks = dict(zip(tasks, suite.answered(asked, results), strict=True))
        found = {name: results.entries[asked.job_of(model, path)] for name, path in texts.items()}
        results.publish(
            {
                **order["header"],
                "marks": {
                    name: [list(asdict(m).values()) for m in a.marks] for name, a in marks.items()
                },
                "chunks": {
                    name: [one for _, one in sorted(f.items())] for name, f in found.items()
                },
            }
        )


if __name__ == "__main__":
    _main()
