from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgemerge import open_model
from edgemerge.formats.quants.codec import CODECS
from edgemerge.types import Float32

TOOL = Path(__file__).resolve().parents[2] / "tools" / "make_gguf.py"


def make(out: Path, *arguments: str) -> Path:
    command = [sys.executable, str(TOOL), "--shape", "zoo", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


def read(path: Path) -> dict[str, Float32]:
    source = open_model(path)
    tensors = {}
    for name, spec in source.specs().items():
        raw = np.empty(spec.nbytes, np.uint8)
        source.read_rows(name, 0, spec.n_rows, raw)
        tensors[name] = np.empty(spec.n_elements, np.float32)
        CODECS[spec.dtype].decode(raw, tensors[name])
    source.close()
    return tensors


@pytest.mark.parametrize("file_type", ["Q4_K_M", "F16"])
def test_an_expert_is_its_base_and_a_small_change(tmp_path: Path, file_type: str) -> None:
    base = read(make(tmp_path / "base.gguf", "--type", file_type))
    expert = read(make(tmp_path / "expert.gguf", "--type", file_type, "--expert", "1"))
    assert base.keys() == expert.keys()
    for name, values in base.items():
        assert np.isfinite(values).all()
        assert values.std() == pytest.approx(0.02, rel=0.25), name
        assert values.mean() == pytest.approx(float("norm" in name), abs=0.01), name
        assert 0 < np.abs(expert[name] - values).mean() < 0.01, name


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    files = [make(tmp_path / name, "--expert", "2").read_bytes() for name in ("a.gguf", "b.gguf")]
    assert files[0] == files[1]
