"""A large tokenizer.json is read apart: the same keys, the same refusals, none of the memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgemerge.errors import FormatError, RuntimeFailure
from edgemerge.formats.tokenizer import process as tokenizer_process
from edgemerge.formats.tokenizer.process import read_tokenizer
from edgemerge.formats.tokenizer.read import tokenizer_metadata

MIB = 1 << 20
VOCAB = 4096


@pytest.fixture
def folder(models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tokenizer of which every file counts as large."""
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(models_dir / "base" / name, tmp_path / name)
    monkeypatch.setattr(tokenizer_process, "LARGE", 1)
    return tmp_path


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def test_the_same_keys(folder: Path) -> None:
    config = config_of(folder)
    apart = read_tokenizer(folder, config, VOCAB, "llama")
    assert apart == tokenizer_metadata(folder, config, VOCAB, "llama")
    assert list(apart) == list(tokenizer_metadata(folder, config, VOCAB, "llama"))


def test_equal_files_are_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(folder)
    first = read_tokenizer(folder, config, VOCAB, "llama")
    monkeypatch.setattr(tokenizer_process, "_read", lambda *_: {"read": b"again"})
    assert read_tokenizer(folder, config, VOCAB, "llama") is first
    assert read_tokenizer(folder, config, VOCAB + 1, "llama") == {"read": b"again"}
    (folder / "added_tokens.json").write_text("{}")
    assert read_tokenizer(folder, config, VOCAB, "llama") == {"read": b"again"}


def test_a_huge_file_is_not_hashed(folder: Path) -> None:
    with (folder / "chat_template.jinja").open("wb") as file:
        file.truncate(1 << 40)
    config = config_of(folder)
    assert tokenizer_process._digest(folder, config, VOCAB, "llama") == b""


def test_the_same_refusal(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": [')
    refusals = []
    for read in (read_tokenizer, tokenizer_metadata):
        with pytest.raises(FormatError) as error:
            read(folder, config_of(folder), VOCAB, "llama")
        refusals.append((str(error.value), error.value.path))
    assert refusals[0] == refusals[1]


@pytest.mark.parametrize("end", ["no memory", "killed"])
def test_a_process_that_ends(folder: Path, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        if end == "no memory":
            raise OSError(12, "Cannot allocate memory")
        return subprocess.CompletedProcess(command, -9, b"", b"")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RuntimeFailure, match=r"tokenizer\.json"):
        read_tokenizer(folder, config_of(folder), VOCAB, "llama")


MEASURE = """
import sys
from pathlib import Path
from edgemerge.formats.tokenizer.process import read_tokenizer
before = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
found = read_tokenizer(Path(sys.argv[1]), {}, int(sys.argv[2]), "llama")
after = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(int(after[0]) - int(before[0]), sum(map(len, found.values())) >> 10)
"""


def test_memory_is_what_is_kept(models_dir: Path, tmp_path: Path) -> None:
    """128 000 tokens: 130 MiB of objects, of which a merge holds the 4 MiB that it writes."""
    shutil.copy(models_dir / "base" / "tokenizer_config.json", tmp_path)
    tokenizer = json.loads((models_dir / "base" / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    vocab |= {f"▁word{i}": i for i in range(len(vocab), 128_000)}
    pieces = [["▁", f"word{i}"] for i in range(200_000)]
    tokenizer["model"]["merges"] += pieces
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), "128000"],
        capture_output=True,
        text=True,
        check=True,
    )
    grown, kept = map(int, done.stdout.split())
    assert kept > 2000
    assert grown < 3 * kept + 4096  # as the answer, and taken apart
