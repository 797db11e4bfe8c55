"""`merge --ask`: the inputs and the result answer side by side."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from edgemerge.cli import make_app
from edgemerge.runtime import smoke
from edgemerge.runtime.smoke import QUESTIONS, Answer, ask_aside
from tests.support.tiny_gguf import write_tiny_gguf

pytestmark = pytest.mark.llama

MERGE = ("merge", "-m", "linear", "a.gguf", "b.gguf", "-o", "ward.gguf", "--force")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny_gguf(tmp_path / "a.gguf")
    shutil.copy("a.gguf", "b.gguf")


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(make_app(), [*MERGE, *arguments])
    assert result.exit_code == 0, result.stderr
    return result


def test_answers_stand_side_by_side() -> None:
    text = run("--ask", "hello").stdout
    _, _, asked = text.partition("\nhello\n")
    assert [line.split()[0] for line in asked.splitlines()] == ["a.gguf", "b.gguf", "ward.gguf"]


def test_nobody_is_asked_where_nobody_looks() -> None:
    assert QUESTIONS[0] not in run().stdout


def test_a_loop_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(models: list[Path], questions: tuple[str, ...]) -> list[Answer]:
        said = "sea " * 40
        return [Answer(str(m), q, said, m.name == "ward.gguf") for m in models for q in questions]

    monkeypatch.setattr(smoke, "ask_aside", answer)
    result = run("--ask", "x")
    assert "  ward.gguf  sea sea" in result.stdout
    assert result.stdout.rstrip().endswith("... (repeats itself)")
    assert result.stderr.startswith("note: ward.gguf repeats itself; smaller weights, ")


def test_what_cannot_be_asked_says_why(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("hello")
    (answer,) = ask_aside([tmp_path / "text.gguf"], ["x"])
    assert answer.problem is not None
    assert "is not a GGUF file" in answer.problem


def test_json_is_one_object_without_answers() -> None:
    result = CliRunner().invoke(make_app(), [*MERGE, "--ask", "x", "--json"])
    assert result.exit_code == 2
    assert "--json prints one object alone" in result.stderr


def test_ask_and_no_ask_exclude_each_other() -> None:
    result = CliRunner().invoke(make_app(), [*MERGE, "--ask", "x", "--no-ask"])
    assert result.exit_code == 2
