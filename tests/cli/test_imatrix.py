"""`edgemerge imatrix`: a matrix that `convert --imatrix` takes, and sentences on what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
from typer.testing import CliRunner

from edgemerge.cli import make_app
from tests.support.tiny_gguf import write_tiny_gguf

pytestmark = pytest.mark.llama

TEXT = "the answer is in the end of it, or so. who has the other one?\n" * 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a directory with a text."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(make_app(), ["imatrix", *arguments])
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def refuse(*arguments: str) -> str:
    result = CliRunner().invoke(make_app(), ["imatrix", *arguments])
    assert result.exit_code == 1
    assert not Path("out.gguf").exists()
    return result.stderr


def test_a_matrix_is_measured_and_quantised_by(model: Path) -> None:
    text = run(str(model), "text.txt", "-o", "out.gguf", "-c", "64", "-t", "1")
    assert text.startswith("out.gguf  ")
    assert "importances of 14 tensors\n" in text
    fields = gguf.GGUFReader("out.gguf").fields
    assert fields["imatrix.datasets"].contents() == ["text.txt"]
    given = ["convert", str(model), "-o", "q.gguf", "--type", "Q4_0", "--imatrix", "out.gguf"]
    result = CliRunner().invoke(make_app(), given)
    assert result.exit_code == 0, result.stderr
    assert gguf.GGUFReader("q.gguf").fields["quantize.imatrix.file"].contents() == "out.gguf"


def test_json_says_what_was_measured(model: Path) -> None:
    options = ("-c", "64", "--chunks", "2", "-t", "1", "--json")
    found = json.loads(run(str(model), "text.txt", "-o", "out.dat", *options))
    assert found.pop("seconds") > 0
    assert found == {
        "output": "out.dat",
        "out_bytes": Path("out.dat").stat().st_size,
        "tensors": 14,
        "chunks": 2,
        "context": 64,
        "notes": [],
    }


def test_what_cannot_be_measured_is_one_sentence(model: Path) -> None:
    Path("short.txt").write_text("the answer")
    short = refuse(str(model), "short.txt", "-o", "out.gguf", "-c", "64")
    assert "and importance over chunks of 64 needs 128: give a longer text, or -c\n" in short
    assert "its context is 256 tokens, not 512" in refuse(str(model), "text.txt", "-o", "out.gguf")
    few = refuse(str(model), "text.txt", "-o", "out.gguf", "-c", "64", "-b", "15")
    assert "need batches of 16 tokens, and these have 15: give a larger -c or --batch\n" in few
    Path("no.gguf").write_text("no model")
    assert refuse("no.gguf", "text.txt", "-o", "out.gguf").startswith("edgemerge: no.gguf: ")
    assert "absent.txt" in refuse(str(model), "absent.txt", "-o", "out.gguf", "-c", "64")
    absent = refuse(str(model), "text.txt", "-o", "absent/out.gguf")
    assert "the folder absent does not exist; make it first" in absent
    assert "is one of the inputs" in refuse(str(model), "text.txt", "-o", "text.txt", "--force")
    assert Path("text.txt").read_text() == TEXT
    Path("there.gguf").write_text("precious")
    assert "give --force" in refuse(str(model), "text.txt", "-o", "there.gguf")


def test_other_endings_of_the_output_are_refused(model: Path) -> None:
    result = CliRunner().invoke(make_app(), ["imatrix", str(model), "text.txt", "-o", "out.foo"])
    assert result.exit_code == 2
    assert "end the name in .gguf" in result.stderr
    assert not Path("out.foo").exists()
