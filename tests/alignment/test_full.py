"""A full alignment: rotated values, and heads and neurons in another order, are brought back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from edgemerge.alignment.heads import align_models
from edgemerge.alignment.records import HeadPlan, Skipped, ValueRotations
from edgemerge.alignment.reordering import find_reordering
from edgemerge.errors import BudgetError, RecipeError, VerificationError
from edgemerge.formats import open_model
from edgemerge.merging.run import merge, plan
from edgemerge.output.report import MergeReport
from edgemerge.provenance.inputs import check_inputs
from edgemerge.recipe.recipe import load_recipe, make_recipe
from edgemerge.runtime.llama import Model
from tests.support.fixtures import unpacked
from tests.support.head_models import ArraySource, head_tensors, random_order, shuffle
from tests.support.small_models import load_gguf, write_gguf

Float32 = NDArray[np.float32]
N_HEADS, N_KV, LENGTH, N_EMBD = 8, 4, 8, 48
SETTINGS: dict[str, Any] = {"attention_head_count": N_HEADS, "attention_head_count_kv": N_KV}
SETTINGS |= {"attention_key_length": LENGTH, "attention_value_length": LENGTH}
ARENA = 1 << 22


def rotation(rng: np.random.Generator, length: int = LENGTH) -> NDArray[np.float64]:
    return np.linalg.qr(rng.standard_normal((length, length)))[0]


def turn(
    tensors: Mapping[str, Float32], layer: int, n_heads: int, n_kv: int, rng: np.random.Generator
) -> dict[str, Float32]:
    """Rotate the values of every group at random, and o back."""
    turned, prefix = dict(tensors), f"blk.{layer}.attn_"
    length = len(tensors[f"{prefix}v.weight"]) // n_kv
    matrices = [rotation(rng, length) for _ in range(n_kv)]
    for name in (f"{prefix}v.weight", f"{prefix}v.bias"):
        if name in tensors:
            parts = np.split(tensors[name].astype(np.float64), n_kv)
            whole = np.concatenate([m @ part for m, part in zip(matrices, parts, strict=True)])
            turned[name] = whole.astype(np.float32)
    parts = np.split(tensors[f"{prefix}output.weight"].astype(np.float64), n_heads, axis=1)
    wide = [part @ matrices[h * n_kv // n_heads].T for h, part in enumerate(parts)]
    turned[f"{prefix}output.weight"] = np.concatenate(wide, axis=1).astype(np.float32)
    return turned


def noisy(
    tensors: Mapping[str, Float32], size: float, rng: np.random.Generator
) -> dict[str, Float32]:
    return {
        k: x + np.float32(size) * rng.standard_normal(x.shape, np.float32)
        for k, x in tensors.items()
    }


def attention(w: Mapping[str, Float32], x: Float32) -> NDArray[np.float64]:
    """Grouped-query attention of llama.cpp with rotary planes of consecutive pairs, in float64."""

    def project(module: str, n: int) -> NDArray[np.float64]:
        weight = w[f"blk.0.{module}.weight"].astype(np.float64)
        bias = w.get(f"blk.0.{module}.bias", np.zeros(len(weight), np.float32))
        return (x @ weight.T + bias).reshape(len(x), n, -1)

    q, k, v = project("attn_q", N_HEADS), project("attn_k", N_KV), project("attn_v", N_KV)
    angles = np.arange(len(x))[:, None] * 100.0 ** (-np.arange(LENGTH // 2) / (LENGTH // 2))
    phase = np.exp(1j * angles)[:, None]

    def rotary(y: NDArray[np.float64]) -> NDArray[np.complex128]:
        return (y[..., ::2] + 1j * y[..., 1::2]) * phase

    turned = rotary(k).repeat(N_HEADS // N_KV, axis=1)
    scores = np.einsum("ihd,jhd->hij", rotary(q), turned.conj()).real / np.sqrt(LENGTH)
    scores[:, np.triu(np.ones((len(x), len(x)), bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    heads = np.einsum("hij,jhd->ihd", weights, v.repeat(N_HEADS // N_KV, axis=1))
    return heads.reshape(len(x), -1) @ w["blk.0.attn_output.weight"].T.astype(np.float64)


def fused(tensors: Mapping[str, Float32]) -> dict[str, Float32]:
    """Put q, k and v into one tensor, and their biases."""
    out = {
        k: x for k, x in tensors.items() if k.split(".")[2] not in ("attn_q", "attn_k", "attn_v")
    }
    for suffix in ("weight", "bias"):
        parts = [tensors.get(f"blk.0.attn_{part}.{suffix}") for part in "qkv"]
        if parts[0] is not None:
            out[f"blk.0.attn_qkv.{suffix}"] = np.concatenate(parts)  # type: ignore[arg-type]
    return out


def aligned(found: HeadPlan, tensors: Mapping[str, Float32], height: int) -> dict[str, Float32]:
    """Read every tensor through its reordering, in blocks of so many rows."""
    out = {}
    for name, x in tensors.items():
        rows = x.reshape(-1, x.shape[-1])
        reordering = find_reordering(found, name, soft=False)
        if reordering is None:
            out[name] = x
            continue
        blocks = []
        for start in range(0, len(rows), height):
            stop = min(start + height, len(rows))
            block = np.empty((stop - start) * rows.shape[1], np.float32)

            def decode(
                first: int, last: int, at: int | None, values: Float32, rows: Float32 = rows
            ) -> None:
                values[:] = rows[first:last].reshape(-1)

            spare = np.empty(height * rows.shape[1], np.float32)
            row = np.empty(rows.shape[1], np.float32)
            reordering.load(start, stop, decode, row, spare, block)
            blocks.append(block.reshape(stop - start, -1))
        out[name] = np.concatenate(blocks).reshape(x.shape)
    return out


def with_biases(rng: np.random.Generator) -> dict[str, Float32]:
    tensors = head_tensors(N_HEADS, N_KV, n_embd=N_EMBD, key=LENGTH, value=LENGTH, seed=11)
    for part, n in (("q", N_HEADS), ("k", N_KV), ("v", N_KV)):
        tensors[f"blk.0.attn_{part}.bias"] = rng.standard_normal(n * LENGTH).astype(np.float32)
    return tensors


def find(
    a: Mapping[str, Float32], b: Mapping[str, Float32], architecture: str = "llama"
) -> HeadPlan:
    sources = [ArraySource(x, architecture=architecture, **SETTINGS) for x in (a, b)]
    (found,) = align_models(*sources, arena_bytes=ARENA, rotates=True)
    assert isinstance(found, HeadPlan)
    return found


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_rotations_are_found_and_change_nothing(noise: float) -> None:
    rng = np.random.default_rng(3)
    a = with_biases(rng)
    hidden = turn(noisy(a, noise, rng), 0, N_HEADS, N_KV, rng)
    b = shuffle(hidden, *random_order(N_HEADS, N_KV, rng))
    found = find(a, b)
    assert isinstance(found.values, ValueRotations)
    assert found.values.identity_cost > 0.6
    assert found.values.cost < (0.1 if noise else 1e-6)
    matrices = found.values.matrices
    assert matrices is not None
    gram = matrices @ matrices.transpose(0, 2, 1)
    np.testing.assert_allclose(gram, np.tile(np.eye(LENGTH), (N_KV, 1, 1)), atol=1e-6)
    restored = aligned(found, b, 5)
    for height in (1, 3, 64):
        again = aligned(found, b, height)
        assert all(np.array_equal(again[name], x) for name, x in restored.items())
    x = rng.standard_normal((7, N_EMBD)).astype(np.float32)
    difference = attention(restored, x) - attention(b, x)
    assert np.abs(difference).max() < 1e-5 * np.abs(attention(b, x)).max()
    distances = [np.linalg.norm(restored[n] - a[n]) / np.linalg.norm(a[n]) for n in a]
    assert max(distances) < (0.45 if noise else 1e-5)


def test_values_in_a_fused_tensor_are_rotated() -> None:
    rng = np.random.default_rng(5)
    a = with_biases(rng)
    b = shuffle(turn(a, 0, N_HEADS, N_KV, rng), *random_order(N_HEADS, N_KV, rng))
    found = find(fused(a), fused(b), "phi3")
    wanted = fused(a)
    for height in (1, 6, 1000):
        for name, x in aligned(found, fused(b), height).items():
            np.testing.assert_allclose(x, wanted[name], atol=2e-5)


def test_heads_that_are_only_permuted_come_back_exactly() -> None:
    rng = np.random.default_rng(6)
    a = with_biases(rng)
    b = shuffle(a, *random_order(N_HEADS, N_KV, rng))
    found = find(a, b)
    assert isinstance(found.values, ValueRotations)
    assert found.values.matrices is None
    assert all(np.array_equal(x, a[name]) for name, x in aligned(found, b, 4).items())


def test_a_group_of_zeros_stays() -> None:
    rng = np.random.default_rng(7)
    a = with_biases(rng)
    b = turn(a, 0, N_HEADS, N_KV, rng)
    for x in (a, b):
        x["blk.0.attn_v.weight"][:LENGTH] = 0.0
        x["blk.0.attn_v.bias"][:LENGTH] = 0.0
        x["blk.0.attn_output.weight"][:, : 2 * LENGTH] = 0.0
    found = find(a, b)
    assert isinstance(found.values, ValueRotations)
    assert found.values.matrices is not None
    assert np.array_equal(found.values.matrices[0], np.eye(LENGTH))


def test_values_of_fine_tunes_stay(models_dir: Path) -> None:
    sources = open_model(models_dir / "base"), open_model(models_dir / "expert-a")
    for found in align_models(*sources, arena_bytes=ARENA, rotates=True):
        assert isinstance(found, HeadPlan)
        assert isinstance(found.values, ValueRotations)
        assert found.values.matrices is None
        assert found.values.cost <= found.values.identity_cost < 0.1


@pytest.mark.parametrize(
    ("changes", "settings", "reason"),
    [
        ({"attn_sub_norm.weight": (N_HEADS * LENGTH,)}, {}, "scaled number by number"),
        ({}, {"attention_clamp_kqv": 8.0}, "clamped"),
    ],
)
def test_layers_whose_values_stay_say_why(
    changes: dict[str, tuple[int, ...]], settings: dict[str, Any], reason: str
) -> None:
    a = head_tensors(N_HEADS, N_KV, n_embd=N_EMBD, key=LENGTH, value=LENGTH)
    a |= {f"blk.0.{stem}": np.ones(shape, np.float32) for stem, shape in changes.items()}
    source = ArraySource(a, **SETTINGS, **settings)
    (found,) = align_models(source, source, arena_bytes=ARENA, rotates=True)
    assert isinstance(found, HeadPlan)
    assert isinstance(found.values, Skipped)
    assert reason in found.values.reason


# -- whole models --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """expert-a and expert-b as F32 GGUF; expert-b shuffled; and shuffled, and its values rotated."""
    folder = tmp_path_factory.mktemp("full")
    models, rng = unpacked("models"), np.random.default_rng(0)
    made = {name: folder / f"{name}.gguf" for name in ("a", "b", "shuffled", "hidden")}
    for name in ("a", "b"):
        recipe = make_recipe(
            "passthrough", [(str(models / f"expert-{name}"), None)], out_type="F32"
        )
        merge(recipe, made[name])
    tensors = dict(load_gguf(made["b"]))
    for layer in range(4):
        part = {name: x for name, x in tensors.items() if name.startswith(f"blk.{layer}.")}
        tensors |= shuffle(part, *random_order(8, 4, rng))
        order = rng.permutation(512)
        for stem in ("gate", "up", "down"):
            name = f"blk.{layer}.ffn_{stem}.weight"
            tensors[name] = tensors[name][:, order] if stem == "down" else tensors[name][order]
    _rewrite(made["b"], made["shuffled"], tensors)
    for layer in range(4):
        tensors = turn(tensors, layer, 8, 4, rng)
    _rewrite(made["b"], made["hidden"], tensors)
    return made


def _rewrite(source: Path, target: Path, tensors: Mapping[str, Float32]) -> None:
    target.write_bytes(source.read_bytes())
    out = np.memmap(target, mode="r+", dtype=np.uint8)
    for tensor in gguf.GGUFReader(source).tensors:
        raw = np.ascontiguousarray(tensors[tensor.name]).view(np.uint8).reshape(-1)
        out[tensor.data_offset : tensor.data_offset + raw.size] = raw
    out.flush()


def linear(
    files: Mapping[str, Path], output: Path, *names: str, weight: float | None = None, **limits: Any
) -> MergeReport:
    weights = (None, None) if weight is None else (1.0 - weight, weight)
    models = [(str(files[name]), w) for name, w in zip(names, weights, strict=True)]
    recipe = make_recipe("linear", models, out_type="F32", align="full")
    return merge(recipe, output, force=True, **{"memory": 512 << 20, **limits})


def logits(path: Path) -> Float32:
    with Model(path, n_threads=1) as model:
        tokens = model.bos + model.tokenize("Question: which group does anaemia belong to?")
        n = len(tokens)
        with model.context(n, n_batch=n, n_outputs=n, exact=True) as context:
            return context.decode(tokens, range(n), [(0,)] * n, [True] * n).copy()


def test_a_shuffled_model_comes_back_exactly(files: dict[str, Path], tmp_path: Path) -> None:
    report = linear(files, tmp_path / "out.gguf", "b", "shuffled")
    assert "attention heads of shuffled.gguf reordered in 4 of 4 layers" in report.notes
    assert "values of shuffled.gguf rotated in 0 of 4 layers" in report.notes
    assert "neurons of shuffled.gguf reordered in 4 of 4 layers" in report.notes
    wanted = load_gguf(files["b"])
    for name, x in load_gguf(tmp_path / "out.gguf").items():
        assert np.array_equal(x, wanted[name]), name


def test_a_rotated_model_comes_back_within_rounding(files: dict[str, Path], tmp_path: Path) -> None:
    report = linear(files, tmp_path / "out.gguf", "b", "hidden")
    assert "values of hidden.gguf rotated in 4 of 4 layers" in report.notes
    wanted = load_gguf(files["b"])
    for name, x in load_gguf(tmp_path / "out.gguf").items():
        np.testing.assert_allclose(x, wanted[name], atol=3e-6 * np.abs(wanted[name]).max())


@pytest.mark.llama
@pytest.mark.parametrize("reference", ["a", "hidden"])
def test_aligning_to_any_reference_keeps_the_function(
    reference: str, files: dict[str, Path], tmp_path: Path
) -> None:
    """All weight is on the second model, which is brought into the order of the first."""
    linear(files, tmp_path / "out.gguf", reference, "shuffled", weight=1.0)
    wanted = logits(files["shuffled"])
    difference = np.abs(logits(tmp_path / "out.gguf") - wanted).max()
    assert difference < 1e-4 * np.abs(wanted).max()


def test_the_bytes_do_not_depend_on_budget_and_threads(
    files: dict[str, Path], tmp_path: Path
) -> None:
    models = [(str(files[name]), None) for name in ("b", "hidden")]
    recipe = make_recipe("linear", models, out_type="F32", align="full")
    with pytest.raises(BudgetError) as caught:
        plan(recipe, memory=1 << 20)
    sums = set()
    for memory, threads in ((caught.value.needed, 1), (256 << 20, 2), (1 << 30, 1)):
        output = tmp_path / "out.gguf"
        linear(files, output, "b", "hidden", memory=memory, threads=threads)
        sums.add(output.read_bytes())
    assert len(sums) == 1


def test_the_command_keeps_the_smallest_budget(files: dict[str, Path], tmp_path: Path) -> None:
    models = [(str(files[name]), None) for name in ("b", "hidden")]
    with pytest.raises(BudgetError) as caught:
        plan(make_recipe("linear", models, out_type="F32", align="full"), memory=1 << 20)
    words = ["merge", "-m", "linear", "--align", "full", "--type", "F32", "--json"]
    words += [*(path for path, _ in models), "-o", str(tmp_path / "out.gguf")]
    command = [sys.executable, "-m", "edgemerge", *words, "--memory", str(caught.value.needed)]
    done = subprocess.run(command, capture_output=True, check=True)
    report = json.loads(done.stdout)
    assert report["peak_rss_bytes"] <= caught.value.needed
    assert "values of hidden.gguf rotated in 4 of 4 layers" in report["notes"]


def test_the_recipe_key_and_slices(files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yml"
    sliced = f"{{sources: [{{model: {files['b']}, layer_range: [0, 4]}}]}}"
    text = f"merge_method: linear\nslices: [{sliced}]\nparameters: {{weight: 1}}\n"
    path.write_text(f"{text}edgemerge: {{align: full}}\n")
    recipe = load_recipe(path)
    assert recipe.align == "full"
    with pytest.raises(RecipeError, match="not in slices"):
        plan(recipe)


def test_inputs_that_were_aligned_cannot_be_checked(files: dict[str, Path], tmp_path: Path) -> None:
    linear(files, tmp_path / "out.gguf", "b", "shuffled")
    with pytest.raises(VerificationError, match="was aligned before it was merged"):
        check_inputs(tmp_path / "out.gguf", [files["b"], files["shuffled"]])


def test_importances_of_rotated_columns_are_mixed_by_squares() -> None:
    rng = np.random.default_rng(8)
    a = with_biases(rng)
    b = turn(a, 0, N_HEADS, N_KV, rng)
    found = find(a, b)
    assert isinstance(found.values, ValueRotations)
    assert found.values.matrices is not None
    reordering = find_reordering(found, "blk.0.attn_output.weight", soft=False)
    assert reordering is not None
    importances = rng.random(N_HEADS * LENGTH).astype(np.float32)
    out, row = importances.copy(), np.empty(N_HEADS * LENGTH, np.float32)
    reordering.order_importances(row, out)
    squares = found.values.matrices.astype(np.float64) ** 2
    parts = np.split(importances, N_HEADS)
    wanted = [squares[h * N_KV // N_HEADS] @ part for h, part in enumerate(parts)]
    np.testing.assert_allclose(out, np.concatenate(wanted), rtol=1e-5)


def test_neurons_with_biases_are_matched(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    n, d = 60, 32
    a = head_tensors(4, 2, n_embd=d)
    for stem, shape in (("gate", (n, d)), ("up", (n, d)), ("down", (d, n))):
        a[f"blk.0.ffn_{stem}.weight"] = rng.standard_normal(shape).astype(np.float32)
        a[f"blk.0.ffn_{stem}.bias"] = rng.standard_normal(shape[0]).astype(np.float32)
    order = rng.permutation(n)
    b = dict(a)
    for stem in ("gate", "up"):
        for suffix in ("weight", "bias"):
            b[f"blk.0.ffn_{stem}.{suffix}"] = a[f"blk.0.ffn_{stem}.{suffix}"][order]
    b["blk.0.ffn_down.weight"] = a["blk.0.ffn_down.weight"][:, order]
    made = [write_gguf(tmp_path / f"{i}.gguf", x) for i, x in enumerate((a, b))]
    recipe = make_recipe(
        "linear", [(str(path), None) for path in made], align="full", out_type="F32"
    )
    merge(recipe, tmp_path / "out.gguf", memory=512 << 20)
    for name, x in load_gguf(tmp_path / "out.gguf").items():
        assert np.array_equal(x, a[name]), name
