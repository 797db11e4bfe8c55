"""Whole merges of small models: what must hold whatever the numbers are."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

import edgemerge
from edgemerge.errors import FormatError, MismatchError, RecipeError
from tests.support.fixtures import unpacked
from tests.support.small_models import (
    edit_hub,
    load_gguf,
    load_hub,
    stored,
    wide_tensors,
    write_gguf,
)
from tests.twins import methods as reference

Float32 = NDArray[np.float32]
Run = Callable[..., Path]

INPUTS = unpacked("golden") / "inputs_f32"
BASE, A, B, C = (INPUTS / role for role in ("base", "a", "b", "c"))
TOLERANCE = 4e-7  # of a tensor's largest magnitude: a few roundings to float32

# Parameters of a, b and c, and of the merge.
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "linear": ([{"weight": 0.5}, {"weight": 0.3}, {"weight": -0.1}], {}),
    "task_arithmetic": ([{"weight": 0.5}, {"weight": 0.3}, {"weight": 0.9}], {"lambda": 1.4}),
    "ties": ([{"weight": w, "density": d} for w, d in ((0.5, 0.2), (0.3, 0.9), (1, 1))], {}),
    "dare_linear": ([{"weight": w, "density": 0.4} for w in (0.5, 0.3, 0.2)], {}),
    "dare_ties": ([{"weight": w, "density": 0.6} for w in (0.5, 0.3, 0.2)], {"rescale": "l1"}),
    "della": ([{"weight": w, "density": 0.6} for w in (0.5, 0.3, 0.2)], {}),
    "della_linear": (
        [{"weight": w, "density": 0.5, "epsilon": 0.4} for w in (0.5, 0.3, 0.2)],
        {"rescale": "expectation"},
    ),
    "breadcrumbs": ([{"weight": w, "density": 0.8} for w in (0.5, 0.3, 0.2)], {"rescale": True}),
    "breadcrumbs_ties": (
        [{"weight": w, "density": 0.6, "gamma": 0.1} for w in (0.5, 0.3, 0.2)],
        {"normalize": True},
    ),
    "slerp": ([{}], {"t": 0.4}),
    "passthrough": ([{"scale": 0.3}], {}),
}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Merge by a recipe: method, models and their parameters, base, parameters; return the file."""
    numbers = count()

    def run(
        method: str,
        models: list[tuple[Path, dict[str, Any]]],
        base: Path | None = None,
        seed: int = 0,
        out_type: str = "F32",
        **parameters: Any,
    ) -> Path:
        recipe: dict[str, Any] = {
            "merge_method": method,
            "models": [{"model": str(path), "parameters": own} for path, own in models],
            "parameters": {key.rstrip("_"): value for key, value in parameters.items()},
            "edgemerge": {"seed": seed, "type": out_type},
        }
        if base is not None:
            recipe["base_model"] = str(base)
        number = next(numbers)
        path = tmp_path / f"recipe-{number}.yml"
        path.write_text(json.dumps(recipe))
        output = tmp_path / f"merged-{number}.gguf"
        edgemerge.merge(edgemerge.load_recipe(path), output)
        return output

    return run


def tensors_of(model: Path) -> dict[str, Float32]:
    return {n: t.astype(np.float32) for n, t in load_hub(model / "model.safetensors").items()}


def as_stored(tensors: dict[str, Float32]) -> dict[str, tuple[str, bytes]]:
    return {name: ("F32", tensor.tobytes()) for name, tensor in tensors.items()}


# -- every method --------------------------------------------------------------------------------


def test_all_methods_are_covered() -> None:
    from edgemerge.methods.table import METHODS

    assert set(CASES) == set(reference.METHODS) <= set(METHODS)


@pytest.mark.parametrize("method", CASES)
def test_merge_equals_the_definition(method: str, run: Run) -> None:
    owns, options = CASES[method]
    experts = [A, B, C][: len(owns)]
    base = BASE if method in reference.PRUNES or method == "slerp" else None
    merged = load_gguf(run(method, list(zip(experts, owns, strict=True)), base, 11, **options))
    bases, inputs = tensors_of(BASE), [tensors_of(path) for path in experts]
    assert merged.keys() == bases.keys()
    for name, got in merged.items():
        models = [(x[name], own) for x, own in zip(inputs, owns, strict=True)]
        named: dict[str, Any] = {"seed": 11, "tensor": name}
        want = reference.merge_tensor(method, bases[name], models, options, **named)
        assert reference.worst_error(got, want) <= TOLERANCE, name


@pytest.mark.parametrize("method", CASES)
def test_overflow_is_an_error_or_does_not_happen(method: str, run: Run, tmp_path: Path) -> None:
    """Finite inputs never become an infinity in silence: here every difference overflows."""
    ends = {}
    for sign, role in ((1, "plus"), (-1, "minus")):
        huge = np.float32(sign * 3e38)

        def all_huge(_name: str, x: Float32, huge: np.float32 = huge) -> Float32:
            return np.full_like(x, huge)

        ends[role] = edit_hub(BASE, tmp_path / role, all_huge)
    owns, options = CASES[method]
    base = ends["minus"] if method in reference.PRUNES or method == "slerp" else None
    message = ""
    try:
        output = run(method, [(ends["plus"], owns[0])], base, **options)
    except MismatchError as error:
        message = str(error)
    if message:
        assert "which F32 cannot hold" in message
    else:
        assert all(np.isfinite(x).all() for x in load_gguf(output).values())


def test_a_result_of_finite_inputs_that_is_none_is_no_matter_of_types(
    run: Run, tmp_path: Path
) -> None:
    huge = edit_hub(BASE, tmp_path / "huge", lambda _, x: np.full_like(x, 3e38))
    with pytest.raises(MismatchError) as caught:
        run("linear", [(huge, {"weight": 2.0}), (huge, {"weight": -2.0})], normalize=False)
    assert caught.value.tensor is not None
    assert str(caught.value) == (
        f"linear has no result for the tensor {caught.value.tensor!r} with normalize: false: some of it is "
        "NaN; use other settings or weights, or another method"
    )


# -- identities ------------------------------------------------------------------------------------


def test_linear_merge_of_a_model_with_itself_is_the_model(run: Run) -> None:
    twice = [(A, {"weight": 0.5}), (A, {"weight": 0.5})]
    assert stored(run("linear", twice)) == as_stored(tensors_of(A))
    uneven = load_gguf(run("linear", [(A, {"weight": 0.3}), (A, {"weight": 0.9})]))
    for name, want in tensors_of(A).items():
        assert uneven[name] == pytest.approx(want, rel=3e-7, abs=0)


@pytest.mark.parametrize("t", [0.0, 0.37, 0.5, 1.0])
def test_slerp_of_a_model_with_itself_is_the_model(t: float, run: Run) -> None:
    copy = run("linear", [(A, {"weight": 1.0})])
    merged = load_gguf(run("slerp", [(copy, {})], A, t=t))
    for name, want in tensors_of(A).items():
        if t in (0.0, 0.5, 1.0):
            assert np.array_equal(merged[name], want)
        assert merged[name] == pytest.approx(want, rel=2e-7, abs=0)


def test_slerp_ends_at_its_models(run: Run) -> None:
    for t, end in ((0, A), (1, B)):
        orders: tuple[list[tuple[Path, dict[str, Any]]], ...] = (
            [(B, {})],
            [(A, {}), (B, {})],
            [(B, {}), (A, {})],
        )
        for entries in orders:
            assert stored(run("slerp", entries, A, t=t)) == as_stored(tensors_of(end))


def test_linear_with_one_weight_is_that_model(run: Run) -> None:
    models = [(A, {"weight": 1.0}), (B, {"weight": 0.0})]
    assert stored(run("linear", models)) == as_stored(tensors_of(A))
    assert stored(run("linear", models[::-1])) == as_stored(tensors_of(A))


@pytest.mark.parametrize("method", reference.PRUNES)
def test_lambda_zero_is_the_base(method: str, run: Run) -> None:
    models = [(A, {"weight": 0.6, "density": 0.5}), (B, {"weight": 0.4, "density": 0.5})]
    assert stored(run(method, models, BASE, lambda_=0)) == as_stored(tensors_of(BASE))


@pytest.mark.parametrize("method", reference.PRUNES)
def test_density_zero_is_the_base(method: str, run: Run) -> None:
    if reference.PRUNES[method]:
        models = [(A, {"weight": 0.6, "density": 0.0})]
        assert stored(run(method, models, BASE)) == as_stored(tensors_of(BASE))


@pytest.mark.parametrize("method", reference.PRUNES)
def test_density_one_prunes_nothing(method: str, run: Run) -> None:
    models = [(A, {"weight": 0.6, "density": 1.0}), (B, {"weight": 0.3, "density": 1})]
    plain = [(A, {"weight": 0.6}), (B, {"weight": 0.3})]
    like = "ties" if method in reference.ELECTS else "task_arithmetic"
    for normalize in (True, False):
        options = {"normalize": normalize}
        assert stored(run(method, models, BASE, **options)) == stored(
            run(like, plain, BASE, **options)
        )


def test_ties_gives_the_example_of_the_specification(run: Run, tmp_path: Path) -> None:
    def norm(values: list[float]) -> Callable[[str, Float32], Float32]:
        return lambda name, x: (
            np.resize(np.array(values, np.float32), 32) if name == "model.norm.weight" else x
        )

    base = edit_hub(BASE, tmp_path / "zero", norm([0]))
    one = edit_hub(A, tmp_path / "one", norm([1, -1, 2, 0]))
    two = edit_hub(B, tmp_path / "two", norm([-1, 1, -1, 0]))
    models = [(one, {"weight": 1, "density": 1}), (two, {"weight": 1, "density": 1})]
    merged = load_gguf(run("ties", models, base))["output_norm.weight"]
    assert merged.reshape(-1, 4).tolist() == [[1, 1, 2, 0]] * 8


def test_the_bases_own_entry_is_no_expert(run: Run) -> None:
    """Neither in the sum of weights nor in the numbering that random masks depend on."""
    own = {"weight": 0.5, "density": 0.5}
    experts = [(A, own), (B, own)]
    for method in ("task_arithmetic", "ties", "dare_ties"):
        for entry in ({}, own):
            with_base = run(method, [(BASE, entry), *experts], BASE, normalize=True)
            assert stored(with_base) == stored(run(method, experts, BASE, normalize=True))


def test_masks_do_not_depend_on_the_order_of_tensors(run: Run, tmp_path: Path) -> None:
    models = [wide_tensors(0)]
    models += [wide_tensors(seed, near=models[0]) for seed in (1, 2)]
    results = []
    for order in (list(models[0]), list(models[0])[::-1]):
        folder = tmp_path / order[0]
        folder.mkdir()
        paths = [
            write_gguf(folder / f"{i}.gguf", {name: tensors[name] for name in order})
            for i, tensors in enumerate(models)
        ]
        own = {"weight": 0.5, "density": 0.5}
        results.append(stored(run("dare_ties", [(p, own) for p in paths[1:]], paths[0])))
    assert list(results[0]) == list(results[1])[::-1]
    assert results[0] == results[1]


# -- passthrough -----------------------------------------------------------------------------------


@pytest.mark.parametrize("file_type", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K"])
def test_passthrough_copies_stored_bytes(file_type: str, run: Run, tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "source.gguf", wide_tensors(0))
    quantised = run("passthrough", [(source, {})], out_type=file_type)
    assert stored(quantised) != stored(source)
    assert stored(run("passthrough", [(quantised, {})], out_type="keep")) == stored(quantised)
    again = run("passthrough", [(quantised, {})], out_type=file_type)
    assert stored(again) == stored(quantised)


def test_passthrough_copies_types_that_nothing_here_writes(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "iq.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(0)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_IQ3_XXS)
    raw = np.random.default_rng(0).integers(0, 256, (8, 98), np.uint8)  # rows of 256
    raw[:, 1] &= 0x3F  # upper byte of the scale: finite
    writer.add_tensor("token_embd.weight", raw, raw_dtype=gguf.GGMLQuantizationType.IQ3_XXS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    copied = stored(run("passthrough", [(path, {})], out_type="keep"))
    assert copied == {"token_embd.weight": ("IQ3_XXS", raw.tobytes())}


def test_scale_multiplies(run: Run) -> None:
    rules = [{"filter": "o_proj", "value": 0.0}, {"filter": "mlp", "value": -2}, {"value": 1}]
    merged = load_gguf(run("passthrough", [(A, {"scale": rules})]))
    for name, x in tensors_of(A).items():
        scale = 0 if "attn_output" in name else -2 if "ffn_" in name and "norm" not in name else 1
        assert np.array_equal(merged[name], np.float32(scale) * x)


# -- what is refused -------------------------------------------------------------------------------


def test_weights_that_cancel_are_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="sum to zero"):
        run("linear", [(A, {"weight": 0.5}), (B, {"weight": -0.5})])
    assert not list(tmp_path.glob("*.gguf*"))
    free = load_gguf(run("linear", [(A, {"weight": 0.5}), (B, {"weight": -0.5})], normalize=False))
    a, b = tensors_of(A), tensors_of(B)
    for name, got in free.items():
        assert np.array_equal(got, np.float32(0.5) * a[name] - np.float32(0.5) * b[name])


@pytest.mark.parametrize("method", ["della", "della_linear"])
@pytest.mark.parametrize("density", [0.1, 0.15, 0.85, 0.9])
def test_della_stays_inside_the_probabilities(method: str, density: float, run: Run) -> None:
    with pytest.raises(RecipeError, match="epsilon") as caught:  # epsilon is 0.15 unless stated
        run(method, [(A, {"weight": 1, "density": density})], BASE)
    assert caught.value.field == "epsilon"
    run(method, [(A, {"weight": 1, "density": density, "epsilon": 0.05})], BASE)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("as_gguf", [False, True], ids=["safetensors", "gguf"])
@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_damage_is_named_and_leaves_no_output(
    culprit: int,
    as_gguf: bool,
    value: float,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One wrong number, in a late block, in the base or in an expert."""
    monkeypatch.setattr("edgemerge.budget.TARGET_ELEMENTS", 100)
    index = 1234

    def spoil(name: str, x: Float32) -> Float32:
        if name == "model.layers.1.mlp.up_proj.weight":
            x.ravel()[index] = value
        return x

    models = [BASE, A, B]
    if as_gguf:
        spoilt = tmp_path / "spoilt.gguf"
        tensors = tensors_of(models[culprit])
        spoil("model.layers.1.mlp.up_proj.weight", tensors["blk.1.ffn_up.weight"])
        write_gguf(spoilt, tensors, n_layers=2)
    else:
        spoilt = edit_hub(models[culprit], tmp_path / "spoilt", spoil)
    models[culprit] = spoilt
    for method in ("task_arithmetic", "ties"):
        with pytest.raises(FormatError) as caught:
            run(method, [(path, {"weight": 1, "density": 0.5}) for path in models[1:]], models[0])
        assert caught.value.path == spoilt
        assert caught.value.tensor == "blk.1.ffn_up.weight"
        assert f"{value} at index {index};" in str(caught.value)
        assert not list(tmp_path.glob("merged-*"))
