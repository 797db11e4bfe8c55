"""A board of 512 MB: a merge and an answer from it, in the memory that it has for programs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.support.fixtures import unpacked
from tests.support.memory_group import MemoryGroup

PROGRAM = [sys.executable, "-m", "edgemerge"]
LIMIT = 450 << 20  # of a Pi Zero 2 W; benchmarks/bench_boards.py has a whole life


def test_a_merge_and_an_answer(tmp_path: Path) -> None:
    models, output = unpacked("models"), tmp_path / "merged.gguf"
    experts = [models / name for name in ("expert-a", "expert-b")]
    flags: list[str | Path] = [
        "-m",
        "task_arithmetic",
        "--base",
        models / "base",
        "--type",
        "Q4_K_M",
        "--json",
    ]
    with MemoryGroup(LIMIT) as group:
        merged = group.run([*PROGRAM, "merge", *flags, *experts, "-o", output])
        assert merged.returncode == 0, merged.stderr
        words = ["--prompt", "Asthma is", "-n", "8", "--temperature", "0", "--json"]
        answered = group.run([*PROGRAM, "run", output, *words])
        assert answered.returncode == 0, answered.stderr
        assert group.kills() == 0
        assert group.peak() <= LIMIT
    assert json.loads(merged.stdout)["out_bytes"] == output.stat().st_size
    assert json.loads(answered.stdout)["text"]
