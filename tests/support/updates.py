"""A device of tiny models without words, and an examiner that knows what each of them answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from edgemerge.fleet.examination import Crash, Show
from edgemerge.fleet.ingredients import FileHashes
from edgemerge.fleet.promotion import Talk
from edgemerge.fleet.report import Report
from edgemerge.fleet.site_file import read_site
from edgemerge.fleet.update import Update
from edgemerge.runtime.evaluation.answers import Answers
from edgemerge.runtime.evaluation.evaluate import Mark
from edgemerge.runtime.smoke import QUESTIONS, Answer
from edgemerge.site.folder import SiteFolder
from tests.support.small_models import wide_tensors, write_gguf

N_QUESTIONS = 200
NAMES = ("base", "a", "b")


def write_device(folder: Path, **changes: Any) -> Path:
    """Write models, questions and a SITE.yml; `changes` are keys of it, None to leave one out."""
    folder.mkdir(exist_ok=True)
    base = wide_tensors(0)
    for seed, name in enumerate(NAMES):
        tensors = base if name == "base" else wide_tensors(seed, base)
        write_gguf(folder / f"{name}.gguf", tensors)
    line = json.dumps({"question": "?", "options": ["yes", "no"], "answer": 0})
    for name in ("disease", "general"):
        (folder / f"{name}.jsonl").write_text(f"{line}\n" * N_QUESTIONS)
    return write_site(folder, **changes)


def write_site(home: Path, **changes: Any) -> Path:
    """Write SITE.yml alone."""
    document: dict[str, Any] = {
        "device": "ward-3",
        "folder": "site",
        "base": {"path": "base.gguf"},
        "experts": [{"path": "a.gguf"}],
        "merge": {"method": "task_arithmetic", "parameters": {"lambda": 0.5}, "type": "Q8_0"},
        "questions": {"disease": "disease.jsonl", "general": "general.jsonl"},
        "promote": {"watch": 0},
    }
    document = {key: value for key, value in (document | changes).items() if value is not None}
    path = home / "SITE.yml"
    path.write_text(yaml.safe_dump(document))
    return path


def marks(n_right: int, n: int = N_QUESTIONS, first: int = 0) -> list[Mark]:
    """Answers of which so many in a row are right."""
    return [Mark(0, 0, first <= i < first + n_right, False) for i in range(n)]


@dataclass
class KnowingExaminer:
    """Gives each model of the site's folder as many right answers as a test says.

    Attributes
    ----------
    right : callable
        Path of a model -> right answers by task.
    crashes : bool
        Whether the new model ends its process.
    speeds : mapping of str to float
        Tokens/s by id; 100 for others.
    problems : list
        What goes wrong with each talk in turn, None for nothing; empty: nothing.
    asked : list of str
        Hashes of the models that were asked.
    """

    right: Callable[[Path], Mapping[str, int]]
    crashes: bool = False
    speeds: Mapping[str, float] = field(default_factory=dict)
    problems: list[str | None] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def ask_all(self, model: Path, sha256: str, show: Show, chunk: int) -> Answers:
        self.asked.append(sha256)
        if self.crashes and model.parent.name == "models":
            raise Crash(f"{model}: llama.cpp ended the process")
        return Answers({name: marks(n) for name, n in self.right(model).items()})

    def talk(self, model: Path) -> Talk:
        problem = self.problems.pop(0) if self.problems else None
        answer = Answer(str(model), QUESTIONS[0], "" if problem else "Paris.", problem=problem)
        return Talk(answer, self.speeds.get(model.stem, 100.0))


def better(model: Path) -> Mapping[str, int]:
    """The new model knows more of diseases."""
    return {"disease": 150 if model.parent.name == "models" else 50, "general": 100}


def worse(model: Path) -> Mapping[str, int]:
    """The new model knows less."""
    return {"disease": 50, "general": 40 if model.parent.name == "models" else 100}


def update(path: Path, examiner: KnowingExaminer, **options: Any) -> Report:
    """Run one update of a SITE.yml."""
    site = read_site(path)
    hashes = FileHashes(SiteFolder(site.folder).hashes if site.folder.exists() else None)
    return Update(site, examiner, hashes, **options).run()


def folder_of(path: Path) -> SiteFolder:
    return SiteFolder(read_site(path).folder)


def state_of(folder: SiteFolder) -> dict[str, Any]:
    """All that a device ends in, without times, and whole: `serves` is the file's own hash."""
    names = [one.id for one in folder.records()]
    return {
        "serves": FileHashes(None).of(folder.current_path) if folder.current_id() else None,
        "history": folder.history(),
        "models": sorted(path.name for path in folder.models.iterdir()),
        "records": {name: _without_times(folder.record(name).as_json()) for name in sorted(names)},
        "trying": folder.trying(),
        "settled": _without_times(folder.settled() or {}),
        "work": sorted(path.name for path in folder.work.iterdir()),
    }


def _without_times(document: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key not in ("made", "time")}
