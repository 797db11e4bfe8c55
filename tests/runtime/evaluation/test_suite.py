"""Several models on several tasks, while the links that name them come to lead elsewhere."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edgemerge.runtime.evaluation.results import Results
from edgemerge.runtime.evaluation.suite import Request, Show, answered, run, text_scores
from edgemerge.runtime.evaluation.tasks import read_task
from edgemerge.runtime.llama import Model
from tests.support.tiny_gguf import write_tiny_gguf

TASK = [
    {"question": "what is the answer", "options": ["the first", "another one"], "answer": 0},
    {"question": "who is in the inn", "options": ["none", "one of the nine"], "answer": 1},
]


@contextmanager
def no_bar(_label: str, _unit: str) -> Iterator[Show]:
    yield lambda _done, _total: None


def lead(link: Path, target: str) -> None:
    """Let a link lead elsewhere, as a site does that promotes."""
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def scores(request: Request, on_load: Callable[[], None]) -> list[object]:
    def load(path: Path) -> Model:
        model = Model(path, n_threads=1)
        on_load()
        return model

    with Results() as results:
        run(request, results, load, no_bar)
        found: list[object] = [one.found for one in answered(request, results)]
        return found + [one.perplexity for one in text_scores(request, results)]


@pytest.mark.llama
@pytest.mark.parametrize("n_loads", [1, 2])
def test_what_links_lead_to_at_the_start_is_scored(n_loads: int, tmp_path: Path) -> None:
    for number in range(3):
        write_tiny_gguf(tmp_path / f"{number}.gguf", seed=number)
        (tmp_path / f"{number}.txt").write_text(f"the answer of the {number + 1} in the inn. " * 40)
        rows = "".join(f"{json.dumps(row)}\n" for row in TASK[number:])
        (tmp_path / f"{number}.jsonl").write_text(rows)
    names = ("current.gguf", "current.jsonl", "current.txt")
    current = [tmp_path / name for name in names]
    for link in current:
        lead(link, f"0{link.suffix}")

    def request(model: Path, task: Path, text: Path) -> Request:
        asked = (read_task("questions", task),)
        return Request((tmp_path / "2.gguf", model), asked, (text,), 64)

    loads: list[int] = []

    def promote() -> None:
        loads.append(1)
        if len(loads) == n_loads:
            for link in current:
                lead(link, f"1{link.suffix}")

    of_files = request(*(tmp_path / f"0{link.suffix}" for link in current))
    assert scores(request(*current), promote) == scores(of_files, lambda: None)


def test_files_are_opened_by_the_names_that_were_given_where_no_link_is(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"")
    plain, link, part = (
        tmp_path / name for name in ("m.gguf", "link.gguf", "m-00001-of-00002.gguf")
    )
    plain.write_bytes(b"")
    for one in (link, part):
        one.symlink_to("blob")
    reading, writing = os.pipe()
    pipe = Path(f"/dev/fd/{reading}")
    relative = Path(os.path.relpath(plain))
    asked = Request((plain, link, part, pipe, relative), (), (), None)
    places = [asked.place_of(path) for path in asked.models]
    os.close(reading)
    os.close(writing)
    # The parts of a split are found beside each other by their names; a pipe leads to no file.
    assert places == [plain, tmp_path / "blob", part, pipe, relative]
    assert asked.job_of(relative, plain) == f"{plain} | {plain}"
