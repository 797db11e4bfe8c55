"""What goes wrong in the child of an update that asks a model: NaN, and ends that are not llama.cpp's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import pytest

pytest.importorskip("llama_cpp")

from edgemerge.errors import RuntimeFailure
from edgemerge.fleet.examination import Crash, LlamaExaminer
from edgemerge.fleet.ingredients import FileHashes
from edgemerge.fleet.report import Report
from edgemerge.fleet.site_file import Rule, read_site
from edgemerge.fleet.update import Update
from edgemerge.fleet.watch import watch_file
from edgemerge.runtime import smoke
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.updates import folder_of, write_site

pytestmark = pytest.mark.llama

HUGE = 3e38  # a float32 that overflows in the next product


def write_device(folder: Path, name: str) -> Path:
    """Write a device of small models that llama.cpp loads; the one of that name computes NaN."""
    for seed, one in enumerate(("base", "a")):
        path = write_tiny_gguf(folder / f"{one}.gguf", seed=seed)
        if one == name:
            tensors = gguf.GGUFReader(path, "r+").tensors
            next(one for one in tensors if one.name == "output_norm.weight").data[:] = HUGE
    lines = [{"question": f"{word} of", "options": ["the", "in"], "answer": 0} for word in "abcdef"]
    (folder / "words.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return write_site(
        folder,
        merge={"method": "task_arithmetic", "parameters": {"lambda": 1.0}, "type": "F32"},
        questions={"words": "words.jsonl"},
        threads=1,
    )


def run(path: Path) -> Report:
    site, hashes = read_site(path), FileHashes(None)
    return Update(site, LlamaExaminer(site, folder_of(path), hashes), hashes).run()


def test_a_new_model_that_computes_no_numbers_is_refused_for_good(tmp_path: Path) -> None:
    path = write_device(tmp_path, "a")
    report = run(path)
    assert report.outcome == "refused", report.reason
    assert "computes NaN or infinity" in report.reason
    assert list(folder_of(path).models.glob("*.gguf")) == []
    assert run(path).outcome == "unchanged"


def test_no_new_model_is_to_blame_for_an_old_one_that_computes_no_numbers(tmp_path: Path) -> None:
    report = run(write_device(tmp_path, "base"))
    assert report.outcome == "failed"
    assert "base.gguf: computes NaN or infinity" in report.reason


@pytest.fixture
def examiner(tmp_path: Path) -> LlamaExaminer:
    path = write_device(tmp_path, "")
    folder_of(path).make()
    return LlamaExaminer(read_site(path), folder_of(path), FileHashes(None))


def use_child(monkeypatch: pytest.MonkeyPatch, folder: Path, does: str) -> None:
    """Let a child be a script that keeps what it is told in `told`, and then does this."""
    script = folder / "child.sh"
    script.write_text(f"#!/bin/sh\nulimit -c 0\ncat > '{folder / 'told'}'\n{does}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


@pytest.mark.parametrize("name", ["ABRT", "SEGV", "ILL", "FPE"])
def test_a_model_is_to_blame_where_llama_cpp_ends_its_process(
    examiner: LlamaExaminer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    use_child(monkeypatch, tmp_path, f"kill -{name} $$")
    with pytest.raises(Crash, match=r"llama\.cpp ended the process"):
        examiner.ask_all(tmp_path / "a.gguf", "a" * 64, lambda *_: None, 256)
    assert examiner.talk(tmp_path / "a.gguf").answer.problem == "llama.cpp crashed"


@pytest.mark.parametrize(
    ("does", "says"),
    [
        ("kill -KILL $$", "ended by SIGKILL (memory may be short)"),
        ("kill -TERM $$", "ended by SIGTERM"),
        ("kill -BUS $$", "ended by SIGBUS (the disk may fail)"),
        ("exit 1", "ended with status 1"),
    ],
)
def test_no_model_is_to_blame_where_its_process_is_ended(
    examiner: LlamaExaminer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, says: str
) -> None:
    """Fault: what was killed where memory is short was refused for good."""
    use_child(monkeypatch, tmp_path, does)
    model = tmp_path / "a.gguf"
    with pytest.raises(RuntimeFailure) as caught:
        examiner.ask_all(model, "a" * 64, lambda *_: None, 256)
    assert not isinstance(caught.value, Crash)
    asked = f"{model}: the process in which it was asked"
    assert str(caught.value) == f"{asked} {says}; the next update asks it again"
    with pytest.raises(RuntimeFailure) as caught:
        examiner.talk(model)
    assert str(caught.value) == f"{model}: its process {says}; the next update asks it again"


def test_no_model_is_to_blame_for_a_slow_card(
    examiner: LlamaExaminer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_child(monkeypatch, tmp_path, "exec sleep 60")
    monkeypatch.setattr(smoke, "START_SECONDS", 0.0)
    monkeypatch.setattr(smoke, "SECONDS", 0.3)
    with pytest.raises(RuntimeFailure, match="loading took too long; the next update asks"):
        examiner.talk(tmp_path / "a.gguf")


def test_no_model_is_to_blame_where_llama_cpp_does_not_load(
    examiner: LlamaExaminer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: what had been promoted was rolled back for good while llama.cpp was not whole."""
    model = tmp_path / "a.gguf"
    with monkeypatch.context() as patch:
        patch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
        with pytest.raises(RuntimeFailure, match=r"llama\.cpp does not load .* asks it again$"):
            watch_file(examiner, model, Rule())
    model.write_bytes(model.read_bytes()[:-100])
    assert "cut off" in str(watch_file(examiner, model, Rule()))


def test_the_smoke_question_takes_the_threads_of_the_site(
    examiner: LlamaExaminer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_child(monkeypatch, tmp_path, "kill -ABRT $$")
    examiner.talk(tmp_path / "a.gguf")
    assert json.loads((tmp_path / "told").read_text())["threads"] == 1
    monkeypatch.undo()
    assert examiner.talk(tmp_path / "a.gguf").answer.problem is None
