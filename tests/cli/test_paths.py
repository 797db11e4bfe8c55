"""Odd paths in every place that takes one: one sentence, never a traceback, nothing written elsewhere."""

from __future__ import annotations

import json
import random
import shutil
from importlib import import_module
from pathlib import Path

import pytest

from edgemerge.cli import COMMANDS
from tests.support.command_lines import ODD_PATHS, PATH_OPTIONS, make_odd_paths, run_aside
from tests.support.tiny_gguf import write_tiny_gguf

pytestmark = pytest.mark.llama

WAITS = {
    "run file",
    "run template",
    "chat template",
    "serve key",
    "bench recipe",
}  # as of `<(command)`
MADE = ("folder", "dangling", "loop", "pipe", "socket", "empty", "text.png")
SECONDS = 120


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    write_tiny_gguf(folder / "tiny.gguf")
    shutil.copy(folder / "tiny.gguf", folder / "copy.gguf")
    question = json.dumps({"question": "?", "options": ["a", "b"], "answer": 0})
    (folder / "questions.jsonl").write_text(f"{question}\n" * 3)
    assert run_aside(("keygen", "own"), folder).code == 0
    return folder


@pytest.fixture(scope="module")
def folder(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    for module in set(COMMANDS.values()):  # once, not in every fork
        import_module(f"edgemerge.cli.{module}")
    for module in ("merging.run", "runtime.llama", "runtime.generate"):
        import_module(f"edgemerge.{module}")
    folder = tmp_path_factory.mktemp("odd")
    make_odd_paths(folder)
    _restore(folder, originals)
    return folder


def _restore(folder: Path, originals: Path) -> None:
    for path in folder.iterdir():
        if path.name in MADE:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    shutil.rmtree(folder / "folder")
    (folder / "folder").mkdir()
    for path in originals.iterdir():
        shutil.copy(path, folder / path.name)


def _listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def check(name: str, odd: str, folder: Path, originals: Path) -> None:
    words = [word.replace("{}", odd) for word in PATH_OPTIONS[name]]
    before = _listing(folder)
    outcome = run_aside(words, folder, SECONDS)
    said = f"{words}: {outcome}"
    assert outcome.code in (0, 1, 2), said
    assert "Traceback" not in outcome.stdout + outcome.stderr, said
    if outcome.code == 1:
        errors = [line for line in outcome.stderr.splitlines() if not line.startswith("note: ")]
        assert len(errors) == 1, said
        assert errors[0].startswith("edgemerge: "), said
    made = _listing(folder) - before
    asked = {"out.gguf", "out.gguf.sig", odd, f"{odd}.pem", f"{odd}.pub.pem", f"{odd}.sig"}
    stray = {
        path
        for path in made
        if not any(path == one or path.startswith(f"{one.rstrip('/')}/") for one in asked if one)
        and not path.startswith((f"{odd}-0000", "demo", "tiny.gguf.sig"))
    }
    assert not stray, said
    if made:
        _restore(folder, originals)


PLACES = (
    "merge output",
    "merge split",
    "merge report",
    "convert output",
    "align plot",
    "keygen name",
)


@pytest.mark.parametrize("odd", ["", ".", "/", "loop", "dangling", "pipe", "n" * 300, "bad\udcff"])
@pytest.mark.parametrize("place", PLACES)
def test_an_output_that_names_no_file(place: str, odd: str, folder: Path, originals: Path) -> None:
    check(place, odd, folder, originals)


def _pairs(n: int) -> list[tuple[str, str]]:
    """Take n pairs of a place and a path, each place at least once where n allows."""
    drawn = random.Random(15)
    pairs = [
        (name, odd)
        for name in PATH_OPTIONS
        for odd in ODD_PATHS
        if not (name in WAITS and odd == "pipe")
    ]
    drawn.shuffle(pairs)
    return pairs[:n]


@pytest.mark.parametrize(("place", "odd"), _pairs(100))
def test_an_odd_path(place: str, odd: str, folder: Path, originals: Path) -> None:
    check(place, odd, folder, originals)


@pytest.mark.slow
def test_every_odd_path_in_every_place(folder: Path, originals: Path) -> None:
    for place, odd in _pairs(len(PATH_OPTIONS) * len(ODD_PATHS)):
        check(place, odd, folder, originals)
