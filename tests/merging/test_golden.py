"""Whole merges against mergekit's own outputs (tests/data/golden/README.md)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import edgemerge
from edgemerge.methods import prunings
from edgemerge.methods.blocks import Block
from edgemerge.methods.pruning import Pruner
from edgemerge.methods.table import METHODS
from tests.support.fixtures import unpacked
from tests.support.small_models import gguf_name as to_gguf_name
from tests.support.small_models import load_gguf, load_hub, to_gguf_rows

GOLDEN = unpacked("golden")
RECIPES = sorted(path.stem for path in (GOLDEN / "recipes_f32").glob("*.yml"))
TOLERANCE = 1e-6  # of a tensor's largest magnitude
OURS = {
    "covariance",
    "hierarchical",
    "iso_c",
    "iso_cts",
    "lines",
    "resmerge",
    "tsv",
}  # not in mergekit
LIKE_ANOTHER = {"della_linear", "breadcrumbs_ties", "passthrough"}  # made of parts that others have


def test_every_method_is_there() -> None:
    assert sorted(path.stem for path in (GOLDEN / "outputs_f32").glob("*.safetensors")) == RECIPES
    assert len(RECIPES) == 24
    methods = {
        yaml.safe_load((GOLDEN / "recipes_f32" / f"{name}.yml").read_text())["merge_method"]
        for name in RECIPES
    }
    assert set(METHODS) - methods == OURS | LIKE_ANOTHER


def place_recipe(name: str, folder: Path) -> Path:
    """The stored recipe with its role names made paths."""
    text = (GOLDEN / "recipes_f32" / f"{name}.yml").read_text()
    inputs = GOLDEN / "inputs_f32"
    text = re.sub(r"(model: )(\w+)$", lambda m: f"{m[1]}{inputs / m[2]}", text, flags=re.M)
    path = folder / f"{name}.yml"
    path.write_text(text)
    return path


def inject_masks(monkeypatch: pytest.MonkeyPatch, name: str, roles: list[str]) -> set[str]:
    """Give the random pruners mergekit's draws for their own; return the set of masks used."""
    masks = {}
    for key, mask in load_file(GOLDEN / "masks_f32" / f"{name}.safetensors").items():
        tensor, role = key.split("|")
        masks[to_gguf_name(tensor), role] = to_gguf_rows(tensor, mask).ravel()
    make = prunings._random_pruner
    used: set[str] = set()

    def make_with_stored_mask(stream: Any, k: int, *args: Any, **kwargs: Any) -> Pruner:
        pruner = make(stream, k, *args, **kwargs)
        stored = masks[stream.job.out.name, roles[k]]

        def prune(block: Block, delta_f32: Any) -> None:
            used.add(f"{stream.job.out.name}|{roles[k]}")
            delta_f32[stored[block.first : block.first + delta_f32.size] == 0] = 0

        monkeypatch.setattr(pruner, "prune", prune)
        return pruner

    monkeypatch.setattr(prunings, "_random_pruner", make_with_stored_mask)
    return used


@pytest.mark.parametrize("name", RECIPES)
def test_merge_agrees_with_mergekit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = place_recipe(name, tmp_path)
    document = yaml.safe_load(path.read_text())
    roles = [Path(entry["model"]).name for entry in document["models"]]
    is_random = (GOLDEN / "masks_f32" / f"{name}.safetensors").exists()
    used = inject_masks(monkeypatch, name, roles) if is_random else set()
    output = tmp_path / "merged.gguf"
    report = edgemerge.merge(edgemerge.load_recipe(path), output)

    assert report.file_type == "F32"  # by dtype: float32 alone
    assert {t.tensor_type for t in gguf.GGUFReader(output).tensors} == {
        gguf.GGMLQuantizationType.F32
    }
    got = load_gguf(output)
    want = load_hub(GOLDEN / "outputs_f32" / f"{name}.safetensors")
    assert want.keys() <= got.keys()
    assert len(used) == (len(want) * len(roles) if is_random else 0)
    for tensor, expected in want.items():
        assert got[tensor].shape == expected.shape
        error = np.abs(got[tensor] - expected.astype(np.float32))
        assert error.max() <= TOLERANCE * np.abs(expected).max(), tensor


def test_the_masks_decide() -> None:
    """mergekit's draws are not ours: without injection the random methods would not agree."""
    masks = load_file(GOLDEN / "masks_f32" / "dare_ties.safetensors")
    shares = {role: [m.mean() for k, m in masks.items() if k.endswith(role)] for role in "ab"}
    assert np.mean(shares["a"]) == pytest.approx(0.5, abs=0.03)
    assert np.mean(shares["b"]) == pytest.approx(0.7, abs=0.03)
