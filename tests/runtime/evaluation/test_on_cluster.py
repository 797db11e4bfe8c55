"""Scores of a cluster are those of one process, to the last bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest

from edgemerge.cluster.connection import Connection
from edgemerge.errors import ClusterError
from edgemerge.runtime.evaluation import on_cluster
from edgemerge.runtime.evaluation.on_cluster import run_on_cluster
from edgemerge.runtime.evaluation.results import Results
from edgemerge.runtime.evaluation.suite import Request
from tests.runtime.evaluation.test_suite import no_bar
from tests.support.dask_cluster import dask_cluster
from tests.support.places import TESTS
from tests.support.tiny_gguf import write_tiny_gguf

pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.llama

QUESTIONS = TESTS / "models/eval/disease.jsonl"
N_QUESTIONS = 120


def evaluate(folder: Path, name: str, *words: str) -> dict[str, Any]:
    models = [str(folder / f"{seed}.gguf") for seed in range(2)]
    asked = ["--task", str(QUESTIONS), "--limit", str(N_QUESTIONS), "--perplexity", "text.txt"]
    command = [sys.executable, "-m", "edgemerge", "eval", *models, *asked, "-o", name, *words]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / name).read_text())


def test_a_cluster_gives_the_same_scores(tmp_path: Path) -> None:
    for seed in range(2):
        write_tiny_gguf(tmp_path / f"{seed}.gguf", seed=seed)
    (tmp_path / "text.txt").write_text("the answer of the one in the inn. " * 40)
    alone = evaluate(tmp_path, "alone.json", "--ctx", "128")
    with dask_cluster(tmp_path, 2) as cluster:
        shared = evaluate(tmp_path, "shared.json", "--ctx", "128", "--cluster", cluster.address)
    assert shared == alone


def test_a_link_that_moves_before_workers_open_it_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: what it led to then was scored, under the name of what it led to at first."""
    for number in range(2):
        (tmp_path / f"{number}.gguf").write_bytes(b"%d" % number)
    current = tmp_path / "current.gguf"
    current.symlink_to("0.gguf")
    request = Request((current,), (), (), None)

    def promote(*_: object) -> None:
        current.unlink()
        current.symlink_to("1.gguf")

    monkeypatch.setattr(on_cluster, "make_quiz", promote)
    with Results() as results, pytest.raises(ClusterError, match=r"current\.gguf leads to another"):
        run_on_cluster(
            request, results, cast("Connection", None), no_bar, gpu_layers=None, loras=()
        )
