"""Every hostile file of all families, each in a process of its own: a named error, soon, in little memory.

`tests.support.bounded` counts what Python and NumPy ask for; here it is what the kernel gives.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.formats.test_hostile_families import REFUSED
from tests.formats.test_hostile_sizes import (
    GIB,
    LARGE_GGUFS,
    LARGE_HEADERS,
    SCALAR_KEYS,
    sparse,
    write_large_array,
    write_large_gguf,
    write_large_header,
)
from tests.support.bounded import MAX_BYTES, MAX_SECONDS

DATA = Path(__file__).resolve().parents[1] / "data"
PATIENCE = 120.0  # seconds for all of them


class Cost(NamedTuple):
    """What one file ended in, and what that took."""

    failure: str | None
    seconds: float
    n_bytes: int


def measure(jobs: list[tuple[str, Path]]) -> dict[Path, Cost]:
    """Read all files, each in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.hostile_child"],
        input=json.dumps([(reader, str(path)) for reader, path in jobs]),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        cwd=DATA.parents[1],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    costs = [Cost(*row) for row in json.loads(done.stdout)]
    return {path: cost for (_, path), cost in zip(jobs, costs, strict=True)}


def check(costs: dict[Path, Cost], *, refused: bool) -> None:
    for path, cost in costs.items():
        if refused:
            assert str(cost.failure).startswith(f"FormatError: {path}: "), (path, cost)
        else:
            assert cost.failure is None, path
        assert cost.seconds < MAX_SECONDS, (path, cost)
        assert cost.n_bytes < MAX_BYTES, (path, cost)


@pytest.mark.parametrize("verdict", ["refuse", "accept"])
def test_the_stored_files(verdict: str) -> None:
    cases = json.loads((DATA / "hostile" / "cases.json").read_text(encoding="utf-8"))
    names = [case["file"] for case in cases if case["want"].startswith(verdict)]
    jobs = [(name.rpartition(".")[2], DATA / "hostile" / name) for name in names]
    assert len(jobs) >= (6 if verdict == "accept" else 50)
    check(measure(jobs), refused=verdict == "refuse")


def test_the_families(tmp_path: Path) -> None:
    jobs = []
    for i, (raw, _) in enumerate(REFUSED.values()):
        path = tmp_path / f"{i}.gguf"
        path.write_bytes(raw)
        jobs.append(("gguf", path))
    check(measure(jobs), refused=True)


def test_large_ones(tmp_path: Path) -> None:
    jobs = [("gguf", write_large_gguf(tmp_path / f"{x}.gguf", x)) for x in LARGE_GGUFS]
    jobs += [("gguf", write_large_array(tmp_path / f"{i}", x)) for i, x in enumerate(SCALAR_KEYS)]
    for what in LARGE_HEADERS:
        path = write_large_header(tmp_path / f"{what}.safetensors", what)
        jobs.append(("safetensors", path))
    check(measure(jobs), refused=True)


def test_importance_matrices(tmp_path: Path) -> None:
    heads = {
        "entries": struct.pack("<i", GIB // 17),
        "name": struct.pack("<ii", 1, GIB // 2),
        "values": struct.pack("<ii1sii", 1, 1, b"a", 1, GIB),
    }
    jobs = [("imatrix", sparse(tmp_path / name, head, GIB)) for name, head in heads.items()]
    check(measure(jobs), refused=True)
