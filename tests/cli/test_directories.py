"""Directories as outputs of the commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from edgemerge.cli import make_app
from tests.support.architecture_models import ARCHITECTURES

LLAMA = str(ARCHITECTURES / "llama")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty directory."""
    monkeypatch.chdir(tmp_path)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(make_app(), list(arguments))


def run(*arguments: str) -> str:
    result = invoke(*arguments)
    assert (result.exit_code, result.stderr) == (0, ""), result.stderr
    return result.stdout


def test_there_and_back() -> None:
    run("convert", LLAMA, "-o", "llama.gguf", "--type", "Q8_0")
    made = json.loads(run("convert", "llama.gguf", "-o", "llama/", "--json"))
    assert (made["output"], made["file_type"]) == ("llama", "F16")
    names = [Path(file["path"]).name for file in made["files"]]
    assert names[0] == "model.safetensors"
    assert set(names) == {path.name for path in Path("llama").iterdir()}
    assert made["inputs"][0]["name"] == "llama.gguf"
    card = Path("llama/README.md").read_text()
    assert "passthrough" in card
    assert '"out_type": "F16"' in card
    assert str(Path.cwd()) not in card
    run("convert", "llama", "-o", "again.gguf", "--type", "Q8_0")
    assert Path("again.gguf").stat().st_size > 0


def test_a_merge_with_a_page_and_shards() -> None:
    options = ("--report", "page.html", "--split-max-size", "20K", "--type", "F32")
    said = run("merge", "-m", "passthrough", LLAMA, "-o", "out/", *options, "--no-ask")
    assert said.startswith("out  ")
    assert "model-00001-of-0000" in said
    assert "passthrough" in Path("page.html").read_text()
    assert len(list(Path("out").glob("*.safetensors"))) > 3


def test_the_plan_knows_the_kind() -> None:
    shown = json.loads(run("plan", "-m", "passthrough", LLAMA, "--format", "hf", "--json"))
    assert shown["file_type"] == "BF16"
    assert {job["to"] for job in shown["jobs"]} == {"BF16"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("-o", "out/", "--format", "gguf"), "leave out --format gguf"),
        (("-o", "out.gguf", "--format", "hf"), "is no .gguf"),
        (("-o", "out/", "--ask", "Well?"), "for GGUF files"),
        (("-o", "out", "--format", "onnx"), "choose one of gguf, hf"),
        (("-o", "no/out/"), "the folder no does not exist"),
        (("-o", "out/", "--type", "Q4_0"), "is written as F32, F16, BF16"),
    ],
)
def test_what_cannot_be_is_refused(options: tuple[str, ...], sentence: str) -> None:
    result = invoke("merge", "-m", "passthrough", LLAMA, *options)
    assert result.exit_code in (1, 2)
    assert sentence in " ".join(result.stderr.replace("│", " ").split())
    assert list(Path().iterdir()) == []


def test_verify_reads_the_checksums_of_a_directory() -> None:
    gemma = str(ARCHITECTURES / "gemma2")
    run("convert", gemma, "-o", "gemma2/", "--split-max-size", "30K")
    said = run("verify", "gemma2", "--input", gemma)
    assert "all 24 tensors are as they were written" in said
    assert "--key" not in said
    assert "what it was merged from" in run("inspect", "gemma2")
    weights = sorted(Path("gemma2").glob("*.safetensors"))[1]
    raw = bytearray(weights.read_bytes())
    raw[-100] ^= 1
    weights.write_bytes(raw)
    result = invoke("verify", "gemma2")
    assert result.exit_code == 1
    assert "1 of 24 tensors changed since the merge" in result.stderr
    result = invoke("verify", gemma)
    assert "has no provenance section" in result.stderr


def test_a_record_lists_all_files() -> None:
    run("convert", LLAMA, "-o", "llama/")
    run("record", "llama", "-o", "record.html")
    page = Path("record.html").read_text()
    assert "Record of llama" in page
    assert all(f"sha256 of {path.name}" in page for path in Path("llama").iterdir())
    result = invoke("record", LLAMA, "-o", "other.html")
    assert "has no provenance section" in result.stderr
