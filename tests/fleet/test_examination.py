"""A model that computes no numbers is asked in the child of an update."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest

pytest.importorskip("llama_cpp")

from edgemerge.fleet.examination import LlamaExaminer
from edgemerge.fleet.ingredients import FileHashes
from edgemerge.fleet.report import Report
from edgemerge.fleet.site_file import read_site
from edgemerge.fleet.update import Update
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
