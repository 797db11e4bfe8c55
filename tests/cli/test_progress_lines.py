"""Progress as lines of JSON for a program that runs a command."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from edgemerge.runtime.complaint import PROGRESS_FD
from tests.support.talking import run


def merge(models: Path, output: Path) -> Any:
    parts = [str(models / "a"), str(models / "b")]
    return run("merge", "-m", "linear", *parts, "--align", "hard", "-o", output, "--json")


def test_a_program_gets_lines_of_the_work_and_of_its_parts(
    golden_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    found: list[bytes] = []

    def read() -> None:
        with os.fdopen(reading, "rb") as file:
            found.extend(file)

    reader = threading.Thread(target=read)
    reader.start()
    monkeypatch.setenv(PROGRESS_FD, str(writing))
    done = merge(golden_dir / "inputs_f32", tmp_path / "out.gguf")
    os.close(writing)
    reader.join()
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in found]
    assert {tuple(line) for line in lines} == {("label", "is_part", "unit", "done", "total")}
    whole = [line for line in lines if not line["is_part"]]
    assert {line["label"] for line in whole} == {"linear -> out.gguf"}
    assert whole[-1]["done"] == whole[-1]["total"] > 0
    assert {line["unit"] for line in whole} == {None}
    parts = {line["label"] for line in lines if line["is_part"]}
    assert "hashing the output" in parts
    assert len(parts) > 1  # heads were aligned, too


def test_a_reader_that_leaves_does_not_end_the_work(
    golden_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setenv(PROGRESS_FD, str(writing))
    done = merge(golden_dir / "inputs_f32", tmp_path / "out.gguf")
    os.close(writing)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("text", ["", "stderr", "-1", "99999999999999999999", "1013"])
def test_what_is_no_descriptor_is_named(
    golden_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv(PROGRESS_FD, text)
    done = merge(golden_dir / "inputs_f32", tmp_path / "out.gguf")
    assert done.exit_code == 2
    assert PROGRESS_FD in done.output
    assert list(tmp_path.iterdir()) == []
