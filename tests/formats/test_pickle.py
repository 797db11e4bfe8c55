"""Pickle, which can run code when it is read, is refused wherever a file is given, with what to do."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgemerge.cli import make_app
from tests.support.tiny_gguf import write_tiny_gguf

SENTENCES = ("pickle is never read", "is a Python pickle, which is never read")


class Trap:
    """What a hostile checkpoint does: it makes a folder as soon as it is read."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("caught",)


def write_zip(path: Path) -> None:
    """A checkpoint as torch.save has written it since 1.6."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Trap(), 2))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden_dir: Path) -> Path:
    """Work beside a sound model, a directory whose weights are pickle, and pickles of all ages."""
    monkeypatch.chdir(tmp_path)
    write_tiny_gguf(Path("sound.gguf"))
    write_zip(Path("pytorch_model.bin"))
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        Path(f"{protocol}.pt").write_bytes(pickle.dumps(Trap(), protocol))
    write_zip(Path("renamed.gguf"))
    shutil.copytree(golden_dir / "inputs_f32" / "a", "model")
    Path("model/model.safetensors").unlink()
    write_zip(Path("model/pytorch_model.bin"))
    return tmp_path


def refuse(*arguments: str) -> str:
    """Run a command that has to end in one sentence, having read no pickle."""
    result = CliRunner().invoke(make_app(), arguments)
    assert result.exit_code == 1, (result.stdout, result.stderr)
    assert not Path("caught").exists()
    assert not Path("out.gguf").exists()
    message = result.stderr.splitlines()[0]
    assert message.startswith("edgemerge: ")
    return message


FILES = ["pytorch_model.bin", "renamed.gguf", *(f"{n}.pt" for n in range(2, 6))]
MERGING = {
    "merge": ("merge", "-m", "linear", "sound.gguf", "{}", "-o", "out.gguf"),
    "base": ("merge", "-m", "ties", "--base", "{}", "sound.gguf", "-o", "out.gguf"),
    "plan": ("plan", "-m", "linear", "sound.gguf", "{}"),
    "convert": ("convert", "{}", "-o", "out.gguf"),
    "inspect": ("inspect", "{}"),
    "align": ("align", "sound.gguf", "{}"),
    "verify": ("verify", "{}"),
    "imatrix": ("convert", "sound.gguf", "-o", "out.gguf", "--type", "Q4_0", "--imatrix", "{}"),
}
RUNNING = {
    "run": ("run", "{}", "-p", "x"),
    "chat": ("chat", "{}"),
    "serve": ("serve", "{}", "--port", "0"),
    "bench": ("bench", "{}", "-p", "8", "-n", "1", "-r", "1"),
    "eval": ("eval", "{}", "--task", "t=t.jsonl"),
    "run lora": ("run", "sound.gguf", "-p", "x", "--lora", "{}"),
    "serve lora": ("serve", "sound.gguf", "--port", "0", "--lora", "{}"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("entry", MERGING)
def test_a_file_is_refused_by_what_merges(entry: str, name: str) -> None:
    message = refuse(*(word.format(name) for word in MERGING[entry]))
    assert name in message
    assert any(sentence in message for sentence in SENTENCES), message
    assert "export safetensors or GGUF instead" in message


@pytest.mark.llama
@pytest.mark.parametrize("name", ["pytorch_model.bin", "renamed.gguf", "5.pt"])
@pytest.mark.parametrize("entry", RUNNING)
def test_a_file_is_refused_by_what_runs(entry: str, name: str) -> None:
    question = {"question": "q", "options": ["a", "b"], "answer": 0}
    Path("t.jsonl").write_text(json.dumps(question) + "\n")
    message = refuse(*(word.format(name) for word in RUNNING[entry]))
    assert name in message
    assert any(sentence in message for sentence in SENTENCES), message
    assert "export safetensors or GGUF instead" in message


@pytest.mark.parametrize("entry", ["merge", "base", "plan", "convert", "inspect", "align"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "weights.pth"])
def test_a_directory_is_refused(entry: str, name: str) -> None:
    Path("model/pytorch_model.bin").rename(f"model/{name}")
    message = refuse(*(word.format("model") for word in MERGING[entry]))
    assert f"holds its weights as pickle only ({name})" in message
    assert "save the model as safetensors, or give a GGUF" in message


def test_a_shard_that_is_pickle_is_refused() -> None:
    write_zip(Path("model/model.safetensors"))
    assert "model.safetensors: is a PyTorch zip; pickle is never read" in refuse("inspect", "model")
