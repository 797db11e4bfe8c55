"""Merges of Hugging Face models of every architecture, judged by what llama.cpp then computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgemerge.merging.run import merge
from edgemerge.recipe.recipe import make_recipe
from edgemerge.runtime.llama import Model
from tests.support.architecture_models import (
    ARCHITECTURES,
    NAMES,
    convert,
    copy_model,
    facts,
    logits,
)
from tests.support.safetensors_files import read_safetensors, write_safetensors


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def last_logits(path: Path, name: str) -> np.ndarray:
    """(1, n_vocab) float32 after the fixture's tokens."""
    tokens = facts(name)["tokens"]
    wanted = [False] * (len(tokens) - 1) + [True]
    with (
        Model(path, n_threads=1) as model,
        model.context(128, n_batch=64, exact=True) as context,
    ):
        return context.decode(tokens, wanted).copy()


def test_two_models_and_their_base(name: str, tmp_path: Path) -> None:
    """The mean of A + D and A - D is A."""
    rng = np.random.default_rng(0)
    folders = [copy_model(name, {}, tmp_path / side) for side in "ab"]
    files = [folder / "model.safetensors" for folder in folders]
    tensors = read_safetensors(files[0])
    noise = {key: 0.1 * rng.standard_normal(x.shape) for key, x in tensors.items()}
    for path, sign in zip(files, (1, -1), strict=True):
        write_safetensors(path, {k: (x + sign * noise[k]) for k, x in tensors.items()})
    target = tmp_path / "out.gguf"
    recipe = make_recipe("linear", [(str(folder), 0.5) for folder in folders], out_type="F32")
    report = merge(recipe, target, threads=1)
    assert report.notes == ()
    np.testing.assert_allclose(
        last_logits(target, name)[0], logits(name, "plain")[-1], rtol=0, atol=1e-3
    )


def test_a_directory_and_a_file(name: str, tmp_path: Path) -> None:
    """A directory merged with itself as GGUF is itself."""
    folder = ARCHITECTURES / name
    file = convert(folder, tmp_path / "file.gguf")
    target = tmp_path / "out.gguf"
    recipe = make_recipe("linear", [(str(folder), 0.5), (str(file), 0.5)], out_type="F32")
    assert merge(recipe, target, threads=1).notes == ()
    np.testing.assert_array_equal(last_logits(target, name), last_logits(file, name))


def test_heads_in_another_order_are_aligned(name: str, tmp_path: Path) -> None:
    """A merged with itself, its heads and KV groups moved about, is A; without alignment it is not."""
    other = copy_model(name, {}, tmp_path)
    config = json.loads((other / "config.json").read_text())
    path = other / "model.safetensors"
    write_safetensors(path, move_heads(read_safetensors(path), config))
    models = [(str(ARCHITECTURES / name), 0.5), (str(other), 0.5)]
    distances = []
    for align in ("hard", "off"):
        target = tmp_path / f"{align}.gguf"
        merge(make_recipe("linear", models, out_type="F32", align=align), target, threads=1)
        found = last_logits(target, name)[0]
        distances.append(float(np.abs(found - logits(name, "plain")[-1]).max()))
    assert distances[0] < 1e-3
    assert distances[1] > 0.02


def move_heads(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Reverse the order of KV groups, and of the query heads in each."""
    n_heads, n_groups = int(config["num_attention_heads"]), int(config["num_key_value_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // n_heads)
    q, kv = n_heads * head_dim, n_groups * head_dim

    def reverse(x: np.ndarray) -> np.ndarray:
        """Whole heads in reverse order, along the first axis."""
        return x.reshape(-1, head_dim, *x.shape[1:])[::-1].reshape(x.shape)

    moved = dict(tensors)
    for key, x in tensors.items():
        module = key.split(".")[-2]
        if module in ("q_proj", "k_proj", "v_proj"):
            moved[key] = reverse(x)
        elif module == "qkv_proj":
            parts = np.split(x, [q, q + kv])
            moved[key] = np.concatenate([reverse(part) for part in parts])
        elif key.endswith(("self_attn.o_proj.weight", "self_attn.out_proj.weight")):
            moved[key] = reverse(x.T).T
        elif module in ("q_norm", "k_norm") and x.size > head_dim:
            moved[key] = reverse(x)
    return moved
