from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_a_profile_adds_up_and_leaves_the_merge_alone(
    tmp_path: Path, models_dir: Path, method: str
) -> None:
    base, expert = models_dir / "base", models_dir / "expert-a"
    merge = ["-m", method, "--base", base, expert, "-o", tmp_path / "out.gguf", "--force"]
    merge += ["--threads", 1, "--type", "Q4_K_M", "--json"]
    plain = json.loads(run("-m", "edgemerge", "merge", *merge))
    found = json.loads(run(ROOT / "tools" / "profile_merge.py", *merge))
    assert found["report"]["sha256"] == plain["sha256"]
    cpu: dict[str, float] = {}
    for spent in found["sections"]:
        assert spent["cpu_s"] >= -1e-6
        cpu[spent["section"]] = cpu.get(spent["section"], 0.0) + spent["cpu_s"]
    assert {"read", "decode", "encode", "write", "merge arithmetic", "SHA-256"} <= cpu.keys()
    # What no stopwatch sees is the threads of NumPy's BLAS, which spin a little before they sleep.
    assert 0.8 * found["cpu_s"] - 0.1 < sum(cpu.values()) <= 1.01 * found["cpu_s"]
    assert 0 < found["first_block_s"] < found["wall_s"]
    assert 0 < found["io_share"] < 1
