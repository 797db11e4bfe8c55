"""Merges weighted by importances: in memory and whole, against the twin; what is refused and noted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from edgemerge import budget, load_recipe, merge, plan
from edgemerge.errors import MismatchError, OutputError, RecipeError
from edgemerge.methods.weighting import column_factors
from edgemerge.recipe.words import describe_recipe, recipe_document
from tests.support.head_merges import convert
from tests.support.imatrix_files import write_gguf as write_matrix
from tests.support.llama_quantize import Quantiser, converted, make_model
from tests.support.memory_stream import merge_in_memory
from tests.support.small_models import load_gguf, wide_tensors, write_gguf
from tests.twins.importance import merge_by_importance

Float32 = NDArray[np.float32]

NEAR = 4e-7


def random_models(shape: tuple[int, ...], count: int) -> list[Float32]:
    rng = np.random.default_rng([count, *shape])
    base = rng.standard_normal(shape)
    changes = [0.1 * rng.standard_normal(shape) for _ in range(count)]
    return [x.astype(np.float32) for x in (base, *(base + change for change in changes))]


def random_importances(shape: tuple[int, ...], count: int) -> list[Float32]:
    """Of each model, (n_matrices, n_cols), over six powers of ten; a column matters to nobody."""
    rng = np.random.default_rng([7, count, *shape])
    n_matrices = shape[0] if len(shape) == 3 else 1
    found = 10.0 ** rng.uniform(-3, 3, (count, n_matrices, shape[-1]))
    found[:, :, 0] = 0
    found[0, :, -1] = 0
    return list(found.astype(np.float32))


def in_memory(arrays: list[Float32], rows: int = 1 << 10, **options: Any) -> Float32:
    weights = options.pop("weights")
    importances = options.pop("importances")
    models = [(x, {"weight": w}) for x, w in zip(arrays[1:], weights, strict=True)]
    return merge_in_memory(
        "hierarchical",
        arrays[0],
        models,
        {"weighting": "importance", **options},
        rows_per_block=rows,
        importances=importances,
    )


# -- one tensor in memory ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 2), (5, 7), (9, 31), (4, 3, 8)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_tensor_is_merged_as_defined(count: int, shape: tuple[int, ...]) -> None:
    arrays, importances = random_models(shape, count), random_importances(shape, count)
    weights = [0.5, 1.5, 1.0][:count]
    for given in (importances, None):
        options: dict[str, Any] = {"importances": given, "weights": weights}
        want = merge_by_importance(arrays[0], arrays[1:], given, weights, 0.7)
        results = [in_memory(arrays, rows, **{**options, "lambda": 0.7}) for rows in (100, 1, 2)]
        assert np.abs(results[0] - want).max() <= NEAR * max(1.0, np.abs(want).max())
        assert len({result.tobytes() for result in results}) == 1


def test_equal_importances_are_plain_weights_and_zero_leaves_a_model_out() -> None:
    factors = np.empty((2, 3), np.float32)
    ones, zeros = np.ones(3, np.float32), np.zeros(3, np.float32)
    column_factors([ones, ones], np.array([3.0, 1.0]), factors)
    assert factors.tolist() == [[0.75] * 3, [0.25] * 3]
    column_factors([zeros, ones], np.array([3.0, 1.0]), factors)
    assert factors.tolist() == [[0.0] * 3, [1.0] * 3]
    column_factors([zeros, zeros], np.array([3.0, 1.0]), factors)
    assert factors.tolist() == [[0.75] * 3, [0.25] * 3]
    mixed = np.array([1, 2, 0], np.float32)
    column_factors([mixed, ones], np.array([1.0, 2.0]), factors)
    assert np.allclose(factors, [[1 / 3, 0.5, 0], [2 / 3, 0.5, 1]], rtol=1e-7)


# -- whole merges ------------------------------------------------------------------------------------


def write_models(folder: Path) -> dict[str, dict[str, Float32]]:
    """A base and two experts with rows of 256, and their matrices."""
    base = wide_tensors(0)
    tensors = {"base": base, "a": wide_tensors(1, near=base), "b": wide_tensors(2, near=base)}
    for name, one in tensors.items():
        write_gguf(folder / f"{name}.gguf", one)
    return tensors


def write_matrices(folder: Path, names: list[str]) -> dict[str, dict[str, Float32]]:
    found: dict[str, dict[str, Float32]] = {}
    for seed, model in enumerate(("a", "b")):
        rng = np.random.default_rng(seed + 5)
        sums = {n: rng.random((1, 256)).astype(np.float32) ** 4 for n in names}
        found[model] = write_matrix(folder / f"{model}.imatrix", sums)
    return found


def write_recipe(folder: Path, *, matrices: tuple[str, ...] = ("a", "b"), more: str = "") -> Path:
    models = "".join(
        f"  - model: {name}.gguf\n    parameters: {{weight: {weight}}}\n"
        + (f"    imatrix: {name}.imatrix\n" if name in matrices else "")
        for name, weight in (("a", 0.7), ("b", 1.4))
    )
    path = folder / "recipe.yml"
    path.write_text(
        f"merge_method: hierarchical\nbase_model: base.gguf\nmodels:\n{models}"
        f"parameters: {{weighting: importance, lambda: 0.9{more}}}\n"
        "edgemerge: {type: F32, align: 'off'}\n"
    )
    return path


MATRICES = [f"blk.0.{stem}.weight" for stem in ("attn_q", "attn_k", "attn_output", "ffn_down")]


@pytest.fixture
def tensors(tmp_path: Path) -> dict[str, dict[str, Float32]]:
    return write_models(tmp_path)


def test_models_are_merged_as_defined(
    tensors: dict[str, dict[str, Float32]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrices = write_matrices(tmp_path, MATRICES)
    recipe = load_recipe(write_recipe(tmp_path))
    report = merge(recipe, tmp_path / "out.gguf")
    assert report.passes == 1
    for name, values in load_gguf(tmp_path / "out.gguf").items():
        base, *experts = (tensors[model][name] for model in ("base", "a", "b"))
        given = [matrices[m][name][None] for m in "ab"] if name in MATRICES else None
        want = merge_by_importance(base, experts, given, [0.7, 1.4], 0.9)
        assert np.abs(values - want).max() <= NEAR * np.abs(want).max(), name
    hashes = {report.sha256}
    for elements, threads, memory in ((300, 3, 96), (1, 2, 2048)):
        monkeypatch.setattr(budget, "TARGET_ELEMENTS", elements)
        again = merge(
            recipe, tmp_path / "out.gguf", threads=threads, memory=memory << 20, force=True
        )
        hashes.add(again.sha256)
    assert len(hashes) == 1


def test_the_report_says_what_has_plain_weights(
    tensors: dict[str, dict[str, Float32]], tmp_path: Path
) -> None:
    write_matrices(tmp_path, MATRICES)
    notes = plan(load_recipe(write_recipe(tmp_path))).notes
    assert "no importances for 3 vectors, such as norms, merged by plain weights" in notes
    assert (
        "no importances for 4 tensors, merged by plain weights: token_embd.weight, output.weight, "
        "blk.0.attn_v.weight, blk.0.ffn_gate.weight"
    ) in notes


def test_a_tensor_that_one_matrix_lacks_has_plain_weights(
    tensors: dict[str, dict[str, Float32]], tmp_path: Path
) -> None:
    write_matrices(tmp_path, MATRICES)
    rng = np.random.default_rng(0)
    write_matrix(
        tmp_path / "b.imatrix", {n: rng.random((1, 256)).astype(np.float32) for n in MATRICES[1:]}
    )
    merge(load_recipe(write_recipe(tmp_path)), tmp_path / "out.gguf")
    name = MATRICES[0]
    base, *experts = (tensors[model][name] for model in ("base", "a", "b"))
    want = merge_by_importance(base, experts, None, [0.7, 1.4], 0.9)
    found = load_gguf(tmp_path / "out.gguf")[name]
    assert np.abs(found - want).max() <= NEAR * np.abs(want).max()


def test_the_output_says_what_weighted_it(
    tensors: dict[str, dict[str, Float32]], tmp_path: Path
) -> None:
    write_matrices(tmp_path, MATRICES)
    recipe = load_recipe(write_recipe(tmp_path))
    merge(recipe, tmp_path / "out.gguf")
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    stated = json.loads(fields["edgemerge.recipe"].contents())
    (part,) = stated["slices"]
    assert [model["imatrix"] for model in part["inputs"]] == ["a.imatrix", "b.imatrix"]
    assert len(fields["edgemerge.model_imatrix_crc32"].contents()) == 2
    lines = describe_recipe(recipe_document(recipe))
    assert "model a.gguf: weight 0.7, importances of a.imatrix" in lines
    assert describe_recipe(stated)[2:] == lines[2:]


def test_a_matrix_is_one_of_the_inputs(
    tensors: dict[str, dict[str, Float32]], tmp_path: Path
) -> None:
    write_matrices(tmp_path, MATRICES)
    recipe = load_recipe(write_recipe(tmp_path))
    before = (tmp_path / "a.imatrix").read_bytes()
    with pytest.raises(OutputError, match="is one of the inputs"):
        merge(recipe, tmp_path / "a.imatrix", force=True)
    assert (tmp_path / "a.imatrix").read_bytes() == before


def test_each_expert_of_a_mixture_has_its_own_importances(tmp_path: Path) -> None:
    model = make_model(n_layers=1, n_experts=4)
    tensors, matrices = {}, {}
    for seed, name in enumerate(("base", "a", "b")):
        source = Quantiser(None, tmp_path).write(model, converted(model, "F32"))
        raw = source.rename(tmp_path / f"{name}.gguf")
        reader = gguf.GGUFReader(raw, "r+")
        rng = np.random.default_rng(seed)
        for tensor in reader.tensors:
            tensor.data[:] = rng.standard_normal(tensor.data.shape).astype(np.float32)
        del reader
        tensors[name] = load_gguf(raw)
        sums = {
            n: rng.random((shape[0] if len(shape) == 3 else 1, shape[-1])).astype(np.float32)
            for n, shape in model.shapes.items()
            if "_exps.weight" in n
        }
        matrices[name] = write_matrix(tmp_path / f"{name}.imatrix", sums)
    merge(load_recipe(write_recipe(tmp_path)), tmp_path / "out.gguf")
    found = load_gguf(tmp_path / "out.gguf")
    for name in matrices["a"]:
        base, *experts = (tensors[m][name] for m in ("base", "a", "b"))
        given = [matrices[m][name].reshape(4, -1) for m in "ab"]
        want = merge_by_importance(base, experts, given, [0.7, 1.4], 0.9)
        assert np.abs(found[name] - want).max() <= NEAR * np.abs(want).max(), name


def test_importances_follow_the_heads(models_dir: Path, tmp_path: Path) -> None:
    """What is multiplied with the columns of attn_output has the order of the heads."""
    models = convert(models_dir, tmp_path, "F32")
    stated = json.loads((models_dir / "expert-b-permuted" / "head_permutation.json").read_text())
    rng = np.random.default_rng(0)
    a, b, permuted = {}, {}, {}
    for layer, order in enumerate(stated["layers"]):
        name = f"blk.{layer}.attn_output.weight"
        a[name], b[name] = (rng.random((1, 256)).astype(np.float32) for _ in range(2))
        permuted[name] = b[name].reshape(8, 32)[order["q_perm"]].reshape(1, 256)
    results = []
    for sums, model in ((b, "expert-b"), (permuted, "expert-b-permuted")):
        write_matrix(tmp_path / "a.imatrix", a)
        write_matrix(tmp_path / "b.imatrix", sums)
        (tmp_path / "recipe.yml").write_text(
            f"merge_method: hierarchical\nbase_model: {models['base']}\nmodels:\n"
            f"  - {{model: {models['expert-a']}, imatrix: a.imatrix}}\n"
            f"  - {{model: {models[model]}, imatrix: b.imatrix}}\n"
            "parameters: {weighting: importance}\nedgemerge: {type: F32}\n"
        )
        merge(load_recipe(tmp_path / "recipe.yml"), tmp_path / "out.gguf", force=True)
        results.append(load_gguf(tmp_path / "out.gguf"))
    assert all(np.array_equal(results[0][name], results[1][name]) for name in results[0])


# -- what is refused ---------------------------------------------------------------------------------


def test_a_model_without_a_matrix_is_named(
    tensors: dict[str, dict[str, Float32]], tmp_path: Path
) -> None:
    write_matrices(tmp_path, MATRICES)
    recipe = load_recipe(write_recipe(tmp_path, matrices=("a",)))
    with pytest.raises(RecipeError, match=r"b\.gguf has none: make it with edgemerge imatrix"):
        plan(recipe)


def test_the_matrix_of_another_model_is_refused(
    tensors: dict[str, dict[str, Float32]], tmp_path: Path
) -> None:
    write_matrices(tmp_path, MATRICES)
    write_matrix(tmp_path / "b.imatrix", {MATRICES[0]: np.ones((1, 5), np.float32)})
    with pytest.raises(MismatchError, match=r"b\.imatrix has 5 importances for 'blk\.0\.attn_q"):
        plan(load_recipe(write_recipe(tmp_path)))


def test_a_matrix_that_is_not_there_is_told(
    tensors: dict[str, dict[str, Float32]], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"models\[0\]\.imatrix: there is no file 'a\.imatrix'"):
        load_recipe(write_recipe(tmp_path))


def test_settings_that_say_nothing_here_are_refused(
    tensors: dict[str, dict[str, Float32]], tmp_path: Path
) -> None:
    write_matrices(tmp_path, MATRICES)
    with pytest.raises(RecipeError, match="leave scope out"):
        plan(load_recipe(write_recipe(tmp_path, more=", scope: row")))
    path = write_recipe(tmp_path)
    path.write_text(path.read_text().replace("weight: 0.7", "weight: -0.7"))
    with pytest.raises(RecipeError, match=r"has the weight -0\.7; give weights from 0"):
        plan(load_recipe(path))


def test_matrices_that_are_not_used_are_noted(
    tensors: dict[str, dict[str, Float32]], tmp_path: Path
) -> None:
    write_matrices(tmp_path, MATRICES)
    path = write_recipe(tmp_path)
    path.write_text(path.read_text().replace("weighting: importance", "weighting: linear"))
    notes = plan(load_recipe(path)).notes
    assert "hierarchical does not use the importance matrix of a.gguf here" in notes
