"""The hierarchical method's weighting: in memory against its definition, and in whole merges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from edgemerge import budget
from edgemerge.errors import RecipeError
from edgemerge.merging.run import merge
from edgemerge.methods.hierarchical import HIERARCHICAL
from edgemerge.recipe.recipe import load_recipe, make_recipe
from tests.support.head_merges import combine, convert, largest_difference
from tests.support.memory_stream import MemoryStream, merge_in_memory
from tests.support.small_models import load_gguf
from tests.twins.hierarchical import deltas_of, gram_of, twin

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Tensors = Mapping[str, Float32]

WEIGHTINGS = ("agreement", "paper", "stock", "linear")


def random_models(shape: tuple[int, ...], count: int, seed: int = 0) -> list[Float32]:
    """A base, and experts whose changes have something in common."""
    rng = np.random.default_rng([seed, *shape])
    base = rng.standard_normal(shape).astype(np.float32)
    common = rng.standard_normal(shape)
    changes = [common * 0.05 + 0.1 * rng.standard_normal(shape) for _ in range(count)]
    return [base, *((base + change).astype(np.float32) for change in changes)]


def in_memory(arrays: Sequence[Float32], rows: int = 1 << 10, **options: Any) -> Float32:
    weights = options.pop("weights", [1.0] * (len(arrays) - 1))
    models = [(x, {"weight": w}) for x, w in zip(arrays[1:], weights, strict=True)]
    return merge_in_memory("hierarchical", arrays[0], models, options, rows_per_block=rows)


# -- one tensor in memory --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1,), (31,), (5, 1), (9, 31), (3, 4097), (2, 3, 8)])
@pytest.mark.parametrize("scope", ["tensor", "row"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_tensor_is_merged_as_defined(weighting: str, scope: str, shape: tuple[int, ...]) -> None:
    for count in (1, 2, 3):
        if weighting == "paper" and count != 2:
            continue
        arrays = random_models(shape, count)
        weights = [0.5, 1.5, 1.0][:count]
        options: dict[str, Any] = {"weighting": weighting, "scope": scope, "weights": weights}
        got = in_memory(arrays, 2, **{**options, "lambda": 0.7})
        want = twin(arrays[0], arrays[1:], **options, scale=0.7)
        scale = max(1.0, float(np.abs(want).max()))
        assert np.abs(got - want).max() <= 4e-7 * scale


def test_a_shared_gram_takes_the_place_of_the_tensors_own() -> None:
    arrays = random_models((6, 20), 2)
    shared = np.array([[4.0, 1.0], [1.0, 1.0]])
    models = [(x, {"weight": 1.0}) for x in arrays[1:]]
    stream = MemoryStream("hierarchical", arrays[0], models, {"scope": "block"}, 4, 0, "")
    stream.layer_sum = shared
    got = np.concatenate([values.copy() for _, values in HIERARCHICAL.blocks(stream)])
    want = twin(arrays[0], arrays[1:], "agreement", gram=shared)
    assert np.abs(got.reshape(6, 20) - want).max() <= 1e-6


@pytest.mark.parametrize("scope", ["tensor", "row"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_block_height_does_not_show(weighting: str, scope: str) -> None:
    arrays = random_models((13, 37), 2)
    results = {
        in_memory(arrays, rows, weighting=weighting, scope=scope).tobytes() for rows in (13, 1, 5)
    }
    assert len(results) == 1


NUMBERS = st.floats(-8, 8, width=32)


@given(
    pair=arrays(np.float32, (2, 3, 5), elements=NUMBERS),
    count=st.sampled_from([2, 4]),
    scope=st.sampled_from(["tensor", "row"]),
    weighting=st.sampled_from(["agreement", "stock", "linear"]),
)
def test_equal_experts_are_kept(
    pair: NDArray[np.float32], count: int, scope: str, weighting: str
) -> None:
    """Within one unit in the last place of the largest number met: the change is rounded.

    A share of a subnormal number is rounded as well: half of the smallest one more for each expert.
    """
    base, expert = pair
    got = in_memory([base] + [expert] * count, scope=scope, weighting=weighting)
    largest = np.maximum(np.maximum(np.abs(base), np.abs(expert)), np.abs(expert - base))
    shares = np.float32(count / 2) * np.spacing(np.float32(0))
    assert (np.abs(got - expert) <= np.spacing(largest) + shares).all()


@given(
    stack=arrays(np.float32, (4, 3, 5), elements=NUMBERS),
    scope=st.sampled_from(["tensor", "row"]),
    weighting=st.sampled_from(["agreement", "linear"]),
    order=st.permutations(range(3)),
)
def test_the_order_of_experts_is_rounding(
    stack: NDArray[np.float32], scope: str, weighting: str, order: list[int]
) -> None:
    base, experts = stack[0], stack[1:]
    one = in_memory([base, *experts], scope=scope, weighting=weighting)
    two = in_memory([base, *experts[order]], scope=scope, weighting=weighting)
    assert np.abs(one - two).max() <= 16 * 1e-6


@given(
    stack=arrays(np.float32, (3, 3, 5), elements=NUMBERS),
    scope=st.sampled_from(["tensor", "row"]),
    weighting=st.sampled_from(WEIGHTINGS),
)
def test_lambda_zero_is_the_base(stack: NDArray[np.float32], scope: str, weighting: str) -> None:
    options: dict[str, Any] = {"lambda": 0.0}
    got = in_memory(list(stack), scope=scope, weighting=weighting, **options)
    assert np.array_equal(got, stack[0])


def test_what_one_expert_changed_is_taken_whole() -> None:
    base, expert = random_models((4, 9), 1)
    for experts in ([expert, base], [base, expert]):
        got = in_memory([base, *experts])
        assert np.array_equal(got, base + (expert - base))
    paper = in_memory([base, base, expert], weighting="paper")
    assert np.array_equal(paper, base)  # the literal rule loses it


# -- whole merges ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def f32(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return convert(models_dir, tmp_path_factory.mktemp("f32"), "F32")


@pytest.fixture(scope="module")
def tensors(f32: dict[str, Path]) -> dict[str, dict[str, Float32]]:
    return {name: load_gguf(path) for name, path in f32.items()}


def in_layer(name: str) -> bool:
    return name.startswith("blk.")


def in_attention(name: str) -> bool:
    """What Hugging Face names self_attn: not the norm before it."""
    return any(f".attn_{part}." in name for part in ("q", "k", "v", "output"))


def layer_grams(models: Sequence[Tensors], shares: Callable[[str], bool]) -> dict[str, Float64]:
    """Layer -> Gram matrix summed over those of its tensors that share one."""
    base, *experts = models
    grams: dict[str, Float64] = {}
    for name in filter(shares, base):
        own = gram_of(deltas_of(base[name], [expert[name] for expert in experts]))
        layer = name.split(".")[1]
        grams[layer] = grams.get(layer, np.zeros_like(own)) + own
    return grams


def expected(
    models: Sequence[Tensors],
    weighting: str,
    scope: str,
    shares: Callable[[str], bool] = in_layer,
) -> dict[str, Float64]:
    """The twin on whole models; with scope block, tensors that share nothing go by themselves."""
    base, *experts = models
    grams = layer_grams(models, shares) if scope == "block" else {}
    result = {}
    for name, x in base.items():
        gram = grams.get(name.split(".")[1]) if shares(name) else None
        own = "row" if scope == "row" else "tensor"
        values = [expert[name] for expert in experts]
        result[name] = twin(x, values, weighting, scope=own, gram=gram)
    return result


def check(path: Path, wanted: Mapping[str, Float64]) -> None:
    found = load_gguf(path)
    assert found.keys() == wanted.keys()
    for name, x in found.items():
        scale = max(1.0, float(np.abs(wanted[name]).max()))
        assert np.abs(x - wanted[name]).max() <= 1e-6 * scale, name


@pytest.mark.parametrize("scope", ["tensor", "block", "row"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_models_are_merged_as_defined(
    weighting: str,
    scope: str,
    f32: dict[str, Path],
    tensors: dict[str, dict[str, Float32]],
    tmp_path: Path,
) -> None:
    experts = [f32["expert-a"], f32["expert-b"]]
    parameters = {"weighting": weighting, "scope": scope}
    combine("hierarchical", f32["base"], experts, tmp_path / "out.gguf", parameters=parameters)
    models = [tensors[name] for name in ("base", "expert-a", "expert-b")]
    check(tmp_path / "out.gguf", expected(models, weighting, scope))


def test_a_scope_for_some_tensors_only(
    f32: dict[str, Path], tensors: dict[str, dict[str, Float32]], tmp_path: Path
) -> None:
    """A layer's attention is weighted as one; its other tensors each by itself, not by attention."""
    rules = [{"filter": "self_attn", "value": "block"}, {"value": "tensor"}]
    experts = [f32["expert-a"], f32["expert-b"]]
    output = tmp_path / "out.gguf"
    combine("hierarchical", f32["base"], experts, output, parameters={"scope": rules})
    models = [tensors[name] for name in ("base", "expert-a", "expert-b")]
    check(output, expected(models, "agreement", "block", in_attention))


def test_a_weighting_for_some_tensors_only(
    f32: dict[str, Path], tensors: dict[str, dict[str, Float32]], tmp_path: Path
) -> None:
    text = f"""
merge_method: hierarchical
base_model: {f32["base"]}
models:
  - model: {f32["expert-a"]}
  - model: {f32["expert-b"]}
parameters:
  weighting:
    - filter: self_attn
      value: agreement
    - value: linear
edgemerge: {{type: F32}}
"""
    (tmp_path / "recipe.yml").write_text(text)
    merge(load_recipe(tmp_path / "recipe.yml"), tmp_path / "out.gguf")
    models = [tensors[name] for name in ("base", "expert-a", "expert-b")]
    agreement, linear = (expected(models, rule, "tensor") for rule in ("agreement", "linear"))
    wanted = {n: (agreement if in_attention(n) else linear)[n] for n in linear}
    check(tmp_path / "out.gguf", wanted)
    assert any(np.abs(agreement[name] - linear[name]).max() > 1e-3 for name in linear)


def test_three_experts(
    f32: dict[str, Path], tensors: dict[str, dict[str, Float32]], tmp_path: Path
) -> None:
    """B counts twice, once with its heads in another order."""
    names = ["expert-a", "expert-b", "expert-b-permuted"]
    experts = [f32[name] for name in names]
    for scope in ("tensor", "block"):
        output = tmp_path / f"{scope}.gguf"
        combine("hierarchical", f32["base"], experts, output, parameters={"scope": scope})
        models = [tensors[name] for name in ("base", "expert-a", "expert-b", "expert-b")]
        check(output, expected(models, "agreement", scope))
    combine("hierarchical", f32["base"], experts[::-1], tmp_path / "reversed.gguf")
    both = [load_gguf(tmp_path / f"{name}.gguf") for name in ("tensor", "reversed")]
    assert 0 < largest_difference(*both) <= 1e-6


@pytest.mark.parametrize("weighting", ["agreement", "linear"])
@pytest.mark.parametrize("scope", ["tensor", "block", "row"])
def test_the_order_of_models_is_rounding(
    weighting: str, scope: str, f32: dict[str, Path], tmp_path: Path
) -> None:
    experts = [f32["expert-a"], f32["expert-b"]]
    results = []
    for order in (experts, experts[::-1]):
        output = tmp_path / "out.gguf"
        parameters = {"weighting": weighting, "scope": scope}
        combine("hierarchical", f32["base"], order, output, parameters=parameters)
        results.append(load_gguf(output))
    assert largest_difference(*results) <= 1e-6


def test_lambda_zero_is_the_base_model(
    f32: dict[str, Path], tensors: dict[str, dict[str, Float32]], tmp_path: Path
) -> None:
    experts = [f32["expert-a"], f32["expert-b-permuted"]]
    output = tmp_path / "out.gguf"
    combine("hierarchical", f32["base"], experts, output, parameters={"lambda": 0})
    assert largest_difference(load_gguf(output), tensors["base"]) == 0


def test_blocks_budget_and_threads_do_not_show_in_any_scope(
    f32: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = [f32["expert-a"], f32["expert-b-permuted"]]
    for scope in ("tensor", "block", "row"):
        hashes = set()
        for elements, run in (
            (1 << 18, {"threads": 1}),
            (3 * 256, {"threads": 3, "memory": 352 << 20}),
            (1, {"threads": 2, "memory": 2 << 30}),
        ):
            monkeypatch.setattr(budget, "TARGET_ELEMENTS", elements)
            options: dict[str, Any] = {"parameters": {"scope": scope}, "run": run}
            report = combine("hierarchical", f32["base"], experts, tmp_path / "o.gguf", **options)
            hashes.add(report.sha256)
        assert len(hashes) == 1, scope


def test_the_papers_weighting_is_for_two(f32: dict[str, Path], tmp_path: Path) -> None:
    experts = [f32["expert-a"], f32["expert-b"], f32["expert-b-permuted"]]
    for models in (experts, experts[:1]):
        with pytest.raises(RecipeError, match="two models, not") as caught:
            combine(
                "hierarchical",
                f32["base"],
                models,
                tmp_path / "out.gguf",
                parameters={"weighting": "paper"},
            )
        assert caught.value.field == "weighting"
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_negative_weight_is_refused(weighting: str, f32: dict[str, Path], tmp_path: Path) -> None:
    """Fault: what the expert of that weight alone had changed was added, not taken off."""
    models = [(str(f32["expert-a"]), 1.0), (str(f32["expert-b"]), -0.5)]
    parameters = {"weighting": weighting}
    base = str(f32["base"])
    recipe = make_recipe("hierarchical", models, base=base, parameters=parameters)
    with pytest.raises(RecipeError, match=r"has the weight -0\.5; give weights from 0") as caught:
        merge(recipe, tmp_path / "out.gguf")
    assert caught.value.field == "weight"


def test_what_is_no_weighting_or_scope_is_refused(f32: dict[str, Path], tmp_path: Path) -> None:
    for key, value in (("weighting", "cosine"), ("scope", "layer")):
        with pytest.raises(RecipeError, match=f"{key} is '{value}'; it must be one of") as caught:
            combine(
                "hierarchical",
                f32["base"],
                [f32["expert-a"]],
                tmp_path / "out.gguf",
                parameters={key: value},
            )
        assert caught.value.field == key


def test_a_base_is_needed(f32: dict[str, Path], tmp_path: Path) -> None:
    recipe = make_recipe("hierarchical", [(str(f32["expert-a"]), None)])
    with pytest.raises(RecipeError, match="hierarchical needs the base"):
        merge(recipe, tmp_path / "out.gguf")
