"""Many merges in one process take as much memory, files and threads as twenty."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.places import ROOT

N_FIRST = 20
MAX_GROWTH = 2 << 20  # bytes


@pytest.mark.parametrize("n_merges", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_merges_leave_nothing_behind(golden_dir: Path, tmp_path: Path, n_merges: int) -> None:
    models = [golden_dir / "inputs_f32" / name for name in "ab"]
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "tests.support.soak",
        *models,
        tmp_path,
        str(n_merges),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    memory, files, threads = zip(*json.loads(done.stdout), strict=True)
    assert len(memory) == n_merges
    assert max(memory[N_FIRST:]) - max(memory[:N_FIRST]) < MAX_GROWTH
    assert len(set(files)) == 1
    assert len(set(threads)) == 1
