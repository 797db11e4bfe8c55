"""Filters, gradients and slices in whole merges: which numbers reach which tensor of which layer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import edgemerge
from edgemerge.errors import MismatchError
from edgemerge.recipe.presets import with_preset
from tests.support.fixtures import unpacked
from tests.support.small_models import (
    block_count,
    deepen_hub,
    load_gguf,
    load_hub,
    stored,
    write_gguf,
)

Float32 = NDArray[np.float32]
MergeBy = Callable[[dict[str, Any]], Path]
Deep = Callable[[str], Path]

INPUTS = unpacked("golden") / "inputs_f32"
LAYERS = 5


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Deep:
    """The golden models with five layers."""
    folder = tmp_path_factory.mktemp("deep")
    made = {role: deepen_hub(INPUTS / role, folder / role, LAYERS) for role in ("base", "a", "b")}
    return made.__getitem__


@pytest.fixture
def merge_by(tmp_path: Path) -> MergeBy:
    """Merge by a recipe given as a dictionary; JSON is YAML."""

    def merge_by(recipe: dict[str, Any]) -> Path:
        path = tmp_path / "recipe.yml"
        path.write_text(json.dumps({"edgemerge": {"type": "F32"}, **recipe}))
        output = tmp_path / "merged.gguf"
        edgemerge.merge(edgemerge.load_recipe(path), output, force=True)
        return output

    return merge_by


def tensors_of(model: Path) -> dict[str, Float32]:
    return {n: t.astype(np.float32) for n, t in load_hub(model / "model.safetensors").items()}


def layer_of(name: str) -> int | None:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else None


def shares_of(merged: Path, base: Path, expert: Path) -> dict[str, float]:
    """By least squares, how far each tensor went from the base to the expert."""
    got, b, x = load_gguf(merged), tensors_of(base), tensors_of(expert)
    shares = {}
    for name, values in got.items():
        way = (x[name] - b[name]).astype(np.float64)
        shares[name] = float(((values - b[name]) * way).sum() / (way**2).sum())
        assert values == pytest.approx(b[name] + shares[name] * way, abs=1e-5)
    return shares


def shares_by_weight(merge_by: MergeBy, deep: Deep, weight: Any) -> dict[str, float]:
    """Share of a's task vector in each tensor when `weight` is its weight."""
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(deep("base")),
        "models": [{"model": str(deep("a")), "parameters": {"weight": weight}}],
    }
    return shares_of(merge_by(recipe), deep("base"), deep("a"))


# -- filters and gradients ---------------------------------------------------------------


def test_a_gradient_runs_over_the_layers(merge_by: MergeBy, deep: Deep) -> None:
    """Embeddings, final norm and head stand at its beginning."""
    points = [0.2, 1.0, 0.4]
    for name, share in shares_by_weight(merge_by, deep, points).items():
        layer = layer_of(name)
        position = 0.0 if layer is None else layer / (LAYERS - 1)
        assert share == pytest.approx(np.interp(position, [0, 0.5, 1], points), abs=1e-5), name


def lines_recipe(deep: Deep) -> dict[str, Any]:
    parameters = {"alpha": 0.3, "beta": 0.5}
    return {"merge_method": "lines", "base_model": str(deep("base")), "parameters": parameters}


def test_lines_scales_by_depth(merge_by: MergeBy, deep: Deep) -> None:
    """The embedding is part of the beginning; final norm and head are of the end."""
    path = merge_by({**lines_recipe(deep), "models": [{"model": str(deep("a"))}]})
    for name, share in shares_of(path, deep("base"), deep("a")).items():
        layer = layer_of(name)
        outside = 0.0 if name == "token_embd.weight" else 1.0
        depth = outside if layer is None else layer / (LAYERS - 1)
        assert share == pytest.approx(0.3 + 0.5 * depth, abs=1e-5), name


def test_lines_counts_the_layers_of_the_output(merge_by: MergeBy, deep: Deep) -> None:
    """The third slice is the last of three layers, the second of the model's own."""
    slices = [
        {
            "sources": [
                {"model": str(deep(role)), "layer_range": [i, i + 1]} for role in ("base", "a")
            ]
        }
        for i in (0, 1, 1)
    ]
    got = load_gguf(merge_by({**lines_recipe(deep), "slices": slices}))
    base, a = tensors_of(deep("base")), tensors_of(deep("a"))
    for layer, share in ((0, 0.3), (1, 0.55), (2, 0.8)):
        stem = "attn_output.weight"
        source = f"blk.{min(layer, 1)}.{stem}"
        want = base[source] + share * (a[source] - base[source])
        assert got[f"blk.{layer}.{stem}"] == pytest.approx(want, abs=1e-5)


def test_the_only_layer_is_the_last(merge_by: MergeBy, deep: Deep) -> None:
    span = {"layer_range": [2, 3]}
    sources = [{"model": str(deep(role)), **span} for role in ("base", "a")]
    path = merge_by({**lines_recipe(deep), "parameters": {}, "slices": [{"sources": sources}]})
    want = tensors_of(deep("a"))["blk.2.attn_output.weight"]  # alpha + beta is 1 by default
    assert load_gguf(path)["blk.0.attn_output.weight"] == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "hierarchical"])
def test_the_ramp_is_a_gradient_of_lambda(deep: Deep, tmp_path: Path, method: str) -> None:
    models = [(str(deep(role)), None) for role in ("a", "b")]
    made = []
    for i, parameters in enumerate(({}, {"lambda": [0.6, 1.2]})):
        recipe = edgemerge.make_recipe(
            method, models, base=str(deep("base")), parameters=parameters, out_type="F32"
        )
        recipe = recipe if parameters else with_preset(recipe, "ramp")
        edgemerge.merge(recipe, tmp_path / f"{i}.gguf")
        made.append(stored(tmp_path / f"{i}.gguf"))
    assert made[0] == made[1]


def test_filters_know_hugging_faces_names(merge_by: MergeBy, deep: Deep) -> None:
    weight = [
        {"filter": "layers.1.self_attn", "value": 0.1},
        {"filter": "self_attn", "value": [0.2, 0.6]},
        {"filter": "embed_tokens", "value": 0.7},
        {"filter": "input_layernorm", "value": 0.8},
        {"filter": "lm_head", "value": 0.9},
        {"filter": "*", "value": 0.5},
        {"filter": "mlp", "value": 0.3},
    ]
    named = {"token_embd.weight": 0.7, "output.weight": 0.9}
    for name, share in shares_by_weight(merge_by, deep, weight).items():
        layer = layer_of(name)
        want = named.get(name, 0.5)
        if "attn_norm" in name:
            want = 0.8
        elif "attn_" in name and layer is not None:
            want = 0.1 if layer == 1 else 0.2 + 0.4 * layer / (LAYERS - 1)
        assert share == pytest.approx(want, abs=1e-5), name


def test_model_before_slice_before_recipe(merge_by: MergeBy, deep: Deep) -> None:
    """Gradients run over a slice; one layer alone lies at its end."""

    def part(first: int, last: int, own: dict[str, Any], parameters: dict[str, Any]) -> Any:
        span = [first, last]
        sources = [
            {"model": str(deep("base")), "layer_range": span},
            {"model": str(deep("a")), "layer_range": span, "parameters": own},
        ]
        return {"sources": sources, "parameters": parameters}

    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(deep("base")),
        "slices": [
            part(0, 2, {"weight": 0.1}, {"weight": 0.2}),
            part(2, 4, {}, {"weight": [0.3, 0.6]}),
            part(4, 5, {}, {}),
        ],
        "parameters": {"weight": [0.8, 0.9]},
    }
    shares = shares_of(merge_by(recipe), deep("base"), deep("a"))
    want = [0.1, 0.1, 0.3, 0.6, 0.9]
    for name, share in shares.items():
        layer = layer_of(name)
        if layer is not None:
            assert share == pytest.approx(want[layer], abs=1e-5), name
    assert shares["token_embd.weight"] == pytest.approx(0.1, abs=1e-5)


def test_slerps_t_goes_by_filter_and_layer(merge_by: MergeBy, deep: Deep) -> None:
    recipe = {
        "merge_method": "slerp",
        "base_model": str(deep("a")),
        "models": [{"model": str(deep("a"))}, {"model": str(deep("b"))}],
        "parameters": {
            "t": [
                {"filter": "self_attn", "value": [0, 0.5, 1]},
                {"filter": "mlp", "value": [1, 0.5, 0]},
                {"value": 1},
            ]
        },
    }
    merged = stored(merge_by(recipe))
    a, b = tensors_of(deep("a")), tensors_of(deep("b"))
    ends = {0: (a, b), LAYERS - 1: (b, a)}
    for name, (_, raw) in merged.items():
        layer = layer_of(name)
        if "norm" in name or layer is None:
            assert raw == b[name].tobytes(), name
        elif layer in ends:
            attention, mlp = ends[layer]
            assert raw == (mlp if "ffn" in name else attention)[name].tobytes(), name


# -- frankenmerges -----------------------------------------------------------------------


def stack(deep: Deep, *parts: tuple[str, int, int]) -> dict[str, Any]:
    slices = [
        {"sources": [{"model": str(deep(role)), "layer_range": [first, last]}]}
        for role, first, last in parts
    ]
    return {"merge_method": "passthrough", "slices": slices}


def test_slices_stack_layers_byte_for_byte(merge_by: MergeBy, deep: Deep) -> None:
    output = merge_by(stack(deep, ("base", 0, 3), ("a", 1, 4), ("base", 4, 5)))
    assert block_count(output) == 7
    origin = [("base", 0), ("base", 1), ("base", 2), ("a", 1), ("a", 2), ("a", 3), ("base", 4)]
    inputs = {role: tensors_of(deep(role)) for role in ("base", "a")}
    merged = stored(output)
    assert {layer_of(name) for name in merged} == {None, *range(7)}
    for name, tensor in merged.items():
        layer = layer_of(name)
        role, old = ("base", None) if layer is None else origin[layer]
        source = name if layer is None else name.replace(f"blk.{layer}.", f"blk.{old}.")
        assert tensor == ("F32", inputs[role][source].tobytes()), name


def test_quantised_slices_stack_byte_for_byte(
    merge_by: MergeBy, deep: Deep, tmp_path: Path
) -> None:
    quantised = {}
    for role in ("base", "a"):
        quantised[role] = tmp_path / f"{role}.gguf"
        recipe = edgemerge.make_recipe("passthrough", [(str(deep(role)), None)], out_type="Q8_0")
        edgemerge.merge(recipe, quantised[role])
    stacked = stack(quantised.__getitem__, ("base", 0, 2), ("a", 1, 5))
    merged = stored(merge_by({**stacked, "edgemerge": {"type": "keep"}}))
    inputs = {role: stored(path) for role, path in quantised.items()}
    origin = [("base", 0), ("base", 1), ("a", 1), ("a", 2), ("a", 3), ("a", 4)]
    for layer, (role, old) in enumerate(origin):
        for part in ("attn_q", "ffn_down", "attn_norm"):
            expected = inputs[role][f"blk.{old}.{part}.weight"]
            assert merged[f"blk.{layer}.{part}.weight"] == expected
    assert merged["blk.0.attn_q.weight"][0] == "Q8_0"


def test_embeddings_come_from_the_first_slice(merge_by: MergeBy, deep: Deep) -> None:
    merged = stored(merge_by(stack(deep, ("a", 0, 2), ("base", 2, 5))))
    assert merged["token_embd.weight"][1] == tensors_of(deep("a"))["token_embd.weight"].tobytes()


def test_norm_and_head_come_from_the_last_slice(merge_by: MergeBy, deep: Deep) -> None:
    """Wherever they stand in the file: a directory's tensors come by name, lm_head first."""
    merged = stored(merge_by(stack(deep, ("a", 0, 2), ("base", 2, 5))))
    last = tensors_of(deep("base"))
    for name in ("output_norm.weight", "output.weight"):
        assert merged[name][1] == last[name].tobytes(), name


@pytest.mark.parametrize("extra", ["blk.1.ffn_up.bias", "cls.weight"])
def test_a_tensor_that_only_an_expert_has_is_refused_in_slices(
    merge_by: MergeBy, tmp_path: Path, extra: str
) -> None:
    """Without a word it would be lost: the slice's reference decides which tensors there are."""
    names = ("token_embd.weight", "blk.0.ffn_up.weight", "blk.1.ffn_up.weight")
    tensors = {name: np.ones((4, 32), np.float32) for name in names}
    plain = write_gguf(tmp_path / "plain.gguf", tensors, n_layers=2)
    more = {**tensors, extra: np.ones((4, 32), np.float32)}
    richer = write_gguf(tmp_path / "richer.gguf", more, n_layers=2)
    slices = [
        {
            "sources": [
                {"model": str(path), "layer_range": [i, i + 1], "parameters": {"weight": 1}}
                for path in (plain, richer)
            ]
        }
        for i in range(2)
    ]
    with pytest.raises(MismatchError, match=rf"'{extra}' of .*richer.gguf is missing in .*plain"):
        merge_by({"merge_method": "linear", "slices": slices})
