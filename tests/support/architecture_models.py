"""The tiny models of tests/data/architectures, and GGUF files of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from edgemerge.merging.run import merge
from edgemerge.recipe.recipe import make_recipe
from tests.support.fixtures import unpacked

ARCHITECTURES = unpacked("architectures")
NAMES = sorted(path.name for path in ARCHITECTURES.iterdir() if path.is_dir())


def facts(name: str) -> dict[str, Any]:
    """What transformers and llama.cpp's converter make of one model."""
    return json.loads((ARCHITECTURES / name / "expected.json").read_text())


CASES = [(name, variant) for name in NAMES for variant in facts(name)["converter"]]


def logits(name: str, variant: str) -> np.ndarray:
    """(shown, n_vocab) float32: what transformers computes."""
    with np.load(ARCHITECTURES / name / "logits.npz") as stored:
        return stored[variant]


def copy_model(name: str, changes: dict[str, Any], folder: Path) -> Path:
    """Copy a model, with some keys of config.json changed."""
    target = folder / name
    shutil.copytree(ARCHITECTURES / name, target)
    config = target / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return target


def convert(model: Path, target: Path) -> Path:
    """Write a directory as a GGUF file in float32."""
    merge(make_recipe("passthrough", [(str(model), None)], out_type="F32"), target, threads=1)
    return target
