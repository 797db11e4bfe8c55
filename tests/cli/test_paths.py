"""Odd paths in every place that takes one: one sentence, never a traceback, nothing written elsewhere."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st

from edgemerge.cli import COMMANDS, make_app
from tests.support.command_lines import ODD_PATHS, PATH_OPTIONS, make_odd_paths, run_aside
from tests.support.tiny_gguf import write_tiny_gguf

pytestmark = pytest.mark.llama

WAITS = {
    "run file",
    "run template",
    "chat template",
    "serve key",
    "bench recipe",
    "record eval",
    "record bench",
    "publish scores",
    "update site",
    "rollback site",
}  # as of `<(command)`
MADE = ("folder", "dangling", "loop", "pipe", "socket", "empty", "text.png")
SECONDS = 120
ENDS = (".sig", ".pem", ".pub.pem", ".journal")  # of files that lie beside one with a given name


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    write_tiny_gguf(folder / "tiny.gguf")
    shutil.copy(folder / "tiny.gguf", folder / "copy.gguf")
    question = json.dumps({"question": "?", "options": ["a", "b"], "answer": 0})
    (folder / "questions.jsonl").write_text(f"{question}\n" * 3)
    write_tiny_gguf(folder / "expert.gguf", seed=1)
    for line in (
        "keygen own",
        "extract tiny.gguf expert.gguf --rank 1 -o adapter",
        "merge -m linear tiny.gguf expert.gguf -o merged.gguf",
        "publish registry --init --root-key own.pem --key own.pem --state state",
    ):
        outcome = run_aside(line.split(), folder)
        assert outcome.code == 0, outcome
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
    shutil.copytree(originals, folder, dirs_exist_ok=True)


def _listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def check(name: str, odd: str, folder: Path, originals: Path) -> None:
    check_line([word.replace("{}", odd) for word in PATH_OPTIONS[name]], folder, originals)


def check_line(words: Sequence[str], folder: Path, originals: Path) -> None:
    before = _listing(folder)
    outcome = run_aside(words, folder, SECONDS)
    made = _listing(folder) - before
    if made:
        _restore(folder, originals)
    said = f"{words}: {outcome}"
    assert outcome.code in (0, 1, 2), said
    assert "Traceback" not in outcome.stdout + outcome.stderr, said
    if outcome.code == 1:
        errors = [line for line in outcome.stderr.splitlines() if not line.startswith("note: ")]
        assert len(errors) == 1, said
        assert errors[0].startswith("edgemerge: "), said
    assert all(_was_asked_for(path, words) for path in made), f"{said} made {made}"


def _was_asked_for(path: str, words: Sequence[str]) -> bool:
    """Tell whether a line names a new file: itself, its folder, or what its name is made from."""
    if words[0] == "demo":
        return path.startswith("demo")
    asked = [word for word in words if word]
    return any(
        path in (word, *(f"{word}{end}" for end in ENDS))
        or path.startswith((f"{word.rstrip('/')}/", f"{word.removesuffix('.gguf')}-0000"))
        for word in asked
    )


PLACES = (
    "merge output",
    "merge split",
    "merge report",
    "convert output",
    "imatrix output",
    "extract output",
    "combine output",
    "record output",
    "align plot",
    "compare plot",
    "keygen name",
)


@pytest.mark.parametrize(
    "odd", ["", ".", "/", "folder/", "loop", "dangling", "pipe", "n" * 300, "bad\udcff"]
)
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


# -- generated lines -----------------------------------------------------------------------------------------

NUMBERS = (
    "0",
    "1",
    "2",
    "-1",
    "0.5",
    "",
    "x",
    "nan",
    "inf",
    "1e999",
    "1_0",
    "٣",
    "0x10",
    "--",
    "99MiB",
)
TEXTS = (
    "x",
    "ties",
    "Q4_K_M",
    "F32",
    "all",
    "1:",
    ":",
    "weight=1",
    "density=x",
    "=",
    "a=b=c",
    "[",
    "{}",
)
FILES = (
    *("tiny.gguf", "copy.gguf", "expert.gguf", "merged.gguf", "adapter"),
    *("questions.jsonl", "own.pem", "own.pub.pem", "out.gguf"),
)
# What would work for as long as it is asked to, or read for ever: serving, and settings that wait.
LEFT_OUT = {"--host", "--port", "--help", "--install", "--yes", "--models", "--state"}


def _options() -> dict[str, list[Any]]:
    group: Any = typer.main.get_command(make_app())
    return {
        name: [p for p in command.params if p.opts[0].startswith("-") and p.opts[0] not in LEFT_OUT]
        for name, command in group.commands.items()
    }


@st.composite
def lines(draw: st.DrawFn) -> list[str]:
    """Draw a line that works but for a path in it, with options added that may fit or not."""
    name = draw(st.sampled_from(sorted(PATH_OPTIONS)))
    odd = ODD_PATHS if name not in WAITS else [path for path in ODD_PATHS if path != "pipe"]
    path = draw(st.sampled_from((*odd, *FILES)))
    words = [word.replace("{}", path) for word in PATH_OPTIONS[name]]
    values = st.sampled_from((*NUMBERS, *TEXTS, *FILES, *(path for path in odd if path != "pipe")))
    options = OPTIONS[words[0]]
    for option in draw(st.lists(st.sampled_from(options), max_size=4)) if options else []:
        added = [draw(st.sampled_from([*option.opts, *option.secondary_opts]))]
        if not option.is_flag:
            added += [draw(values) for _ in range(max(option.nargs, 1))]
        at = draw(st.integers(1, len(words)))
        words = [*words[:at], *added, *words[at:]]
    return words


OPTIONS = _options()


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(words=lines())
def test_a_generated_line(words: list[str], folder: Path, originals: Path) -> None:
    check_line(words, folder, originals)


@pytest.mark.slow
@pytest.mark.parametrize("piece", range(20))
def test_ten_thousand_generated_lines(piece: int, folder: Path, originals: Path) -> None:
    @seed(piece)
    @settings(max_examples=500, deadline=None, database=None, phases=[Phase.generate])
    @given(words=lines())
    def check_one(words: list[str]) -> None:
        check_line(words, folder, originals)

    check_one()


# Lines that these tests once found wrong: they waited, left two lines on stderr, or a traceback.
@pytest.mark.parametrize(
    "line",
    [
        "eval tiny.gguf --perplexity pipe",
        "sign tiny.gguf --force --key loop",
        "eval tiny.gguf --task questions=questions.jsonl --perplexity empty -o out.json",
    ],
)
def test_a_line_that_was_wrong(line: str, folder: Path, originals: Path) -> None:
    check_line(line.split(), folder, originals)


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("eval tiny.gguf --task question.jsonl", "questions.jsonl"),
        ("merge recipe.yaml -o out.gguf", "recipe.yml"),
        ("sign tiny.gguf --key ovn.pem", "own.pem"),
    ],
)
def test_a_misspelt_path_is_guessed(line: str, meant: str, folder: Path, originals: Path) -> None:
    (folder / "recipe.yml").touch()
    said = run_aside(line.split(), folder).stderr
    _restore(folder, originals)
    assert f"did you mean '{meant}'?" in said
