from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

TOOL = Path(__file__).resolve().parents[2] / "tools" / "make_tiny_model.py"


def make(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "base"
    assert make("--shape", "zoo", "--dtype", "f32", "--out", out).returncode == 0
    return out


def test_it_has_the_tensors_of_the_real_model(base: Path, models_dir: Path) -> None:
    with safe_open(models_dir / "base" / "model.safetensors", "numpy") as real:
        shapes = {name: real.get_slice(name).get_shape() for name in real.keys()}  # noqa: SIM118
    assert {name: list(x.shape) for name, x in load_file(base / "model.safetensors").items()} == (
        shapes
    )
    ours = json.loads((base / "config.json").read_text())
    theirs = json.loads((models_dir / "base" / "config.json").read_text())
    assert {key: theirs[key] for key in ours if key != "torch_dtype"} == (
        {key: ours[key] for key in ours if key != "torch_dtype"}
    )


def test_shards_and_runs_do_not_change_the_weights(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "sharded"
    assert make("--shape", "zoo", "--dtype", "f32", "--shard-mb", 5, "--out", out).returncode == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) == 3
    whole = load_file(base / "model.safetensors")
    assert set(index) == set(whole)
    for name, file in index.items():
        np.testing.assert_array_equal(load_file(out / file)[name], whole[name])


def test_an_expert_is_its_base_plus_noise(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "expert"
    made = make("--noise-of", base, "--std", 0.01, "--out", out)
    assert made.returncode == 0, made.stderr
    expert, origin = (load_file(path / "model.safetensors") for path in (out, base))
    name = "model.layers.2.mlp.down_proj.weight"
    noise = expert[name] - origin[name]
    assert noise.std() == pytest.approx(0.01, rel=0.01)
    assert abs(np.corrcoef(noise.ravel(), origin[name].ravel())[0, 1]) < 0.02
    assert make("--noise-of", base, "--out", out).returncode == 1


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_halves_are_the_nearest(base: Path, tmp_path: Path, dtype: str) -> None:
    out = tmp_path / dtype
    assert make("--shape", "zoo", "--dtype", dtype, "--out", out).returncode == 0
    exact = load_file(base / "model.safetensors")
    with safe_open(out / "model.safetensors", "numpy") as made:
        dtypes = {made.get_slice(name).get_dtype() for name in exact}
    assert dtypes == {dtype.upper()}
    raw = (out / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    begin, end = header["model.embed_tokens.weight"]["data_offsets"]
    bits = np.frombuffer(raw[8 + length + begin : 8 + length + end], dtype=np.uint16)
    values = (
        bits.view(np.float16).astype(np.float32)
        if dtype == "f16"
        else (bits.astype(np.uint32) << 16).view(np.float32)
    )
    x = exact["model.embed_tokens.weight"].ravel()
    half_step = np.maximum(np.abs(x) * 2.0 ** (-11 if dtype == "f16" else -8), 2.0**-25)
    assert (np.abs(values - x) <= half_step).all()
