"""Merges in fresh processes, whose memory is counted, of models that are larger than their budgets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from edgemerge import merge
from edgemerge.recipe.recipe import make_recipe
from tests.support.small_models import wide_tensors, write_gguf


def write_large_models(folder: Path) -> list[Path]:
    """Write two models of 32 MB each."""
    paths = []
    for number in range(2):
        tensors = wide_tensors(number)
        tensors["token_embd.weight"] = np.random.default_rng(number).random(
            (30_000, 256), np.float32
        )
        paths.append(folder / f"large-{number}.gguf")
        write_gguf(paths[-1], tensors)
    return paths


def write_shards(model: Path, folder: Path) -> Path:
    """Write a directory again, in shards and with an index."""
    recipe = make_recipe("passthrough", [(str(model), None)], out_format="hf")
    merge(recipe, folder, split_bytes=1_500_000)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


def merge_in_process(models: list[str], output: Path, memory: str) -> dict[str, int | str]:
    """Run `edgemerge merge --json`, and return what it prints."""
    line = ["merge", "-m", "linear", *models, "--memory", memory, "--threads", "2", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "edgemerge", *line, "-o", str(output)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, int | str] = json.loads(done.stdout)
    return report
