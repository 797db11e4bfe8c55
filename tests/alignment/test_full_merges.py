"""A full alignment: models whose values are rotated, heads and neurons shuffled, are brought back."""

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

from edgemerge.errors import BudgetError, RecipeError, VerificationError
from edgemerge.merging.run import merge, plan
from edgemerge.output.report import MergeReport
from edgemerge.provenance.inputs import check_inputs
from edgemerge.recipe.recipe import load_recipe, make_recipe
from edgemerge.runtime.llama import Model
from tests.support.fixtures import unpacked
from tests.support.head_models import head_tensors, random_order, rotate_values, shuffle
from tests.support.small_models import load_gguf, write_gguf

Float32 = NDArray[np.float32]


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
        tensors = rotate_values(tensors, layer, 8, 4, rng)
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
            return context.decode(tokens, [True] * n).copy()


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
