"""What a merged file is worth: right answers, perplexity, free answers; kept, so a stopped bench goes on.

Scores stay in a JSON file of the cache, by the SHA-256 of the weights that were scored and of all that was
asked. The same recipe on the same models gives the same weights, so a merge that was scored is not again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from measure import EDGEMERGE, run
from quality_rows import Row

from edgemerge.formats.gguf.model import GgufModel
from edgemerge.runtime.conversation import Conversation
from edgemerge.runtime.engine.messages import Sampling
from edgemerge.runtime.evaluation.evaluate import Mark, mark, score
from edgemerge.runtime.evaluation.likelihood import option_likelihoods
from edgemerge.runtime.evaluation.perplexity import cut_text, perplexity_of, score_chunks
from edgemerge.runtime.evaluation.tasks import Task, read_task
from edgemerge.runtime.generate import Session
from edgemerge.runtime.llama import Model
from edgemerge.runtime.template import load_template

SETS = ("disease", "substance", "general")
MEDICAL = SETS[:2]  # what the experts were tuned on
TEXT = Path(__file__).with_name("plain_text.txt")
TEXT_CONTEXT = 256  # tokens; the small models have no more
CHAT_CONTEXT = 512
MAX_TOKENS = 48  # of a free answer


@dataclass(frozen=True)
class Asked:
    """What every file is asked."""

    tasks: Mapping[str, Task]
    prompts: tuple[str, ...] = ()  # each the first message of a conversation

    @classmethod
    def of(cls, folder: Path, limit: int | None, prompts: Sequence[str] = ()) -> Asked:
        """Read the sets of a folder; of each `limit` questions, which `edgemerge eval` draws too."""
        tasks = {name: read_task(name, folder / f"{name}.jsonl", limit=limit) for name in SETS}
        return cls(tasks, tuple(prompts))

    def parts(self) -> dict[str, Part]:
        """Return what is scored and kept by itself.

        `sets` has for each name the score, and the options that were chosen as one digit for each
        question. `perplexity` has value and standard error. `answers` are the free ones.
        """
        questions = {name: list(map(asdict, t.questions)) for name, t in self.tasks.items()}
        return {
            "sets": Part(questions, lambda m: {n: _ask(m, t) for n, t in self.tasks.items()}),
            "perplexity": Part([TEXT.read_text(), TEXT_CONTEXT], _perplexity),
            "answers": Part(
                [self.prompts, MAX_TOKENS, CHAT_CONTEXT],
                lambda m: [_answer(m, prompt) for prompt in self.prompts],
            ),
        }


class Part(NamedTuple):
    """What a model is asked, in terms of JSON, and how."""

    asked: Any
    score: Callable[[Model], Any]

    @property
    def sha256(self) -> str:
        """Of all that the result depends on beside the model."""
        text = json.dumps([self.asked, version("llama_cpp_python")])
        return hashlib.sha256(text.encode()).hexdigest()


class Scores:
    """Scores of files, kept in a JSON file, which several of these may use by turns."""

    def __init__(self, path: Path, asked: Asked) -> None:
        self.path, self.parts = path, asked.parts()

    def of(self, model: Path, *, only_kept: bool = False) -> dict[str, Any] | None:
        """Score what was not asked of the same weights before; None where that is forbidden."""
        kept = json.loads(self.path.read_text()) if self.path.is_file() else {}
        weights = digest(model)
        keys = {name: f"{weights} {part.sha256}" for name, part in self.parts.items()}
        missing = [name for name, key in keys.items() if key not in kept]
        if missing and only_kept:
            return None
        if missing:
            with Model(model) as loaded:
                kept |= {keys[name]: self.parts[name].score(loaded) for name in missing}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(kept))
            partial.replace(self.path)
        return {name: kept[key] for name, key in keys.items()}


def digest(path: Path) -> str:
    """SHA-256 of all that a model computes with; names, and how it was made, do not count."""
    found = hashlib.sha256()
    with closing(GgufModel(path)) as model:
        for key, value in sorted(model.metadata().items()):
            if not key.startswith(("general.", "edgemerge.")):
                found.update(key.encode() + value)
        for name, spec in model.specs().items():
            data = np.empty(spec.nbytes, np.uint8)
            model.read_bytes(name, 0, data)
            found.update(f"{name} {spec.shape} {spec.dtype}".encode() + data.tobytes())
    return found.hexdigest()


def _ask(model: Model, task: Task) -> dict[str, Any]:
    likelihoods = option_likelihoods(model, task.questions)
    marks = [mark(*pair) for pair in zip(task.questions, likelihoods, strict=True)]
    return {
        "score": asdict(score(task.questions, likelihoods)),
        "chosen": "".join(str(one.chosen) for one in marks),
        "chosen_norm": "".join(str(one.chosen_norm) for one in marks),
    }


def _perplexity(model: Model) -> list[float]:
    chunks = score_chunks(model, cut_text(model, TEXT, TEXT_CONTEXT))
    found = perplexity_of(chunk for _, chunk in chunks)
    return [found.value, found.stderr]


def _answer(model: Model, prompt: str) -> str:
    template = load_template(model)
    if template is None:
        raise SystemExit(f"{model.path} has no chat template, and so no conversation")
    with Session(model, CHAT_CONTEXT, Sampling(temperature=0.0)) as session:
        said = Conversation(session, template, max_tokens=MAX_TOKENS).ask(prompt)
        return "".join(said).strip()


def distinct_words(answers: Sequence[str]) -> float:
    """Return how many different words an answer has for each word in it, on average.

    A model that says the same again and again has a low figure.
    """
    words = [answer.lower().split() for answer in answers]
    return sum(len(set(one)) / len(one) for one in words if one) / max(1, len(words))


def marks_of(sheet: Mapping[str, Any], task: Task, name: str) -> list[Mark]:
    """Return the marks of a scored file on one set, as they were."""
    found = sheet["sets"][name]
    pairs = zip(map(int, found["chosen"]), map(int, found["chosen_norm"]), strict=True)
    return [
        Mark(chosen, norm, chosen == question.answer, norm == question.answer)
        for question, (chosen, norm) in zip(task.questions, pairs, strict=True)
    ]


def read_options(parser: argparse.ArgumentParser, limit: int | None) -> argparse.Namespace:
    """Read the command line of a bench: its own options and those of both."""
    parser.add_argument(
        "--limit",
        type=int,
        default=limit,
        help=f"questions per set, drawn at random [{limit or 'all'}]",
    )
    parser.add_argument(
        "--finished", action="store_true", help="write the table of what a stopped run scored"
    )
    return parser.parse_args()


# -- merges --------------------------------------------------------------------------------------------

Figures = dict[
    str, Any
]  # of one file: what `score_file` found, `cpu_s` and `peak_mib` of its merge
Found = dict[str, list[tuple[Row, Figures]]]  # by type


class Job(NamedTuple):
    """One file to make and score: its row, the arguments of its merge, its type."""

    row: Row
    words: list[str]
    file_type: str
    scores: Scores


def measure(jobs: Sequence[Job], folder: Path, *, only_kept: bool = False) -> Found:
    """Make and score every file; tell progress on stderr.

    With `only_kept`, files without kept scores have no figures, and types without any are left out.
    """
    found: Found = {}
    output = folder / "merged.gguf"
    for number, (row, words, file_type, scores) in enumerate(jobs, start=1):
        cost = make(words, file_type, output)
        started = time.monotonic()
        sheet = scores.of(output, only_kept=only_kept)
        found.setdefault(file_type, []).append((row, {**sheet, **cost} if sheet else {}))
        if sheet is None:
            continue
        took = time.monotonic() - started
        shown = " ".join(f"{100 * sheet['sets'][name]['score']['acc']:.1f}" for name in SETS)
        label = f"{row.group} {row.label}, {file_type}"
        print(f"{number}/{len(jobs)} {label}: {shown} ({took:.0f} s)", file=sys.stderr)
    return {file_type: rows for file_type, rows in found.items() if any(one for _, one in rows)}


def make(words: Sequence[str], file_type: str, output: Path) -> dict[str, float]:
    """Merge in a fresh process; return its CPU seconds and its peak in MiB."""
    command = ["merge", *words, "-o", str(output), "--type", file_type, "--force", "--json"]
    cost = run([*EDGEMERGE, *command])
    report = json.loads(cost.output[cost.output.index("{") :])  # notes stand before it
    return {"cpu_s": cost.cpu_s, "peak_mib": report["peak_rss_bytes"] / 2**20}


def as_json(found: Found) -> list[dict[str, Any]]:
    """Return the figures as `run.py` takes them: an entry for each file."""
    return [
        {**asdict(row), "type": file_type, **figures}
        for file_type, rows in found.items()
        for row, figures in rows
    ]
