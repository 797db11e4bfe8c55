"""Whole merges by the methods that combine directions or elements: bases, recipes, numbers that overflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import edgemerge
from edgemerge.errors import FormatError, MismatchError, RecipeError
from edgemerge.recipe.words import describe_recipe, recipe_document
from edgemerge.types import Recipe
from tests.support.fixtures import unpacked
from tests.support.small_models import edit_hub, load_gguf, stored

INPUTS = unpacked("golden") / "inputs_f32"
BASE, A, B, C = (str(INPUTS / role) for role in ("base", "a", "b", "c"))

# Method -> models, whether it needs a base, parameters.
CASES: dict[str, tuple[int, bool, dict[str, Any]]] = {
    "model_stock": (2, True, {}),
    "nuslerp": (2, False, {}),
    "multislerp": (2, False, {}),
    "karcher": (2, False, {}),
    "sce": (2, True, {"select_topk": 0.5}),
    "ram": (2, True, {}),
    "ramplus_tl": (2, True, {}),
    "arcee_fusion": (1, True, {}),
    "nearswap": (1, True, {"t": 0.01}),
}


def recipe_of(method: str, models: list[str], base: str | None = None, **options: Any) -> Recipe:
    pairs = [(path, 0.5) for path in models]
    return edgemerge.make_recipe(
        method, pairs, base=base, parameters=options or CASES[method][2], out_type="F32"
    )


@pytest.fixture
def ends(tmp_path: Path) -> list[str]:
    """A base, and models whose every difference from it overflows float32."""

    def full(sign: float, name: str) -> str:
        huge = np.float32(sign * 3e38)
        return str(edit_hub(Path(BASE), tmp_path / name, lambda _, x: np.full_like(x, huge)))

    return [full(-1, "minus"), full(1, "plus"), full(1, "too")]


@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("method", CASES)
def test_overflow_is_an_error_or_does_not_happen(
    method: str, based: bool, ends: list[str], tmp_path: Path
) -> None:
    count, needs_base, _ = CASES[method]
    base, models = (ends[0], ends[1:]) if based or needs_base else (None, ends)
    message = ""
    try:
        edgemerge.merge(recipe_of(method, models[:count], base), tmp_path / "out.gguf")
    except MismatchError as error:
        message = str(error)
    if message:
        assert "which F32 cannot hold" in message
    else:
        merged = load_gguf(tmp_path / "out.gguf")
        assert all(np.isfinite(x).all() for x in merged.values())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("damaged", [0, 1])
@pytest.mark.parametrize("method", CASES)
def test_a_number_that_is_none_is_found_in_every_input(
    method: str, damaged: int, bad: float, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def spoil(tensor: str, x: Any) -> Any:
        if tensor == name:
            x = x.copy()
            x[3, 5] = bad
        return x

    count, needs_base, _ = CASES[method]
    models = [A, B][:count]
    spoiled = str(edit_hub(Path(BASE if damaged == 0 else A), tmp_path / "spoiled", spoil))
    if damaged:
        models[0] = spoiled
    base = (spoiled if damaged == 0 else BASE) if needs_base or damaged == 0 else None
    recipe = recipe_of(method, models, base)
    with pytest.raises(FormatError, match=r"spoiled.*blk\.1\.ffn_up.*holds (nan|inf) at index 101"):
        edgemerge.merge(recipe, tmp_path / "out.gguf")


@pytest.mark.parametrize("method", ["nuslerp", "multislerp"])
def test_a_base_is_used_where_one_is_named(method: str, tmp_path: Path) -> None:
    """Its own entry among the models counts as no model then."""
    results = []
    for i, (models, base) in enumerate((([A, B], None), ([A, B], BASE), ([BASE, A, B], BASE))):
        output = tmp_path / f"{i}.gguf"
        report = edgemerge.merge(recipe_of(method, models, base), output)
        assert not [note for note in report.notes if "has no base" in note]
        results.append(stored(output))
    assert results[0] != results[1] == results[2]


def test_a_base_is_one_more_model_of_karcher(tmp_path: Path) -> None:
    """As in mergekit, whose method ignores which model is the base."""
    results = []
    for i, (models, base) in enumerate((([A, B], BASE), ([A, B, BASE], BASE), ([A, B], None))):
        output = tmp_path / f"{i}.gguf"
        recipe = recipe_of("karcher", models, base, max_iter=999.0, tol=1e-10)
        report = edgemerge.merge(recipe, output)
        assert not [note for note in report.notes if "has no base" in note]
        results.append(stored(output))
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_one_model_alone_is_copied(method: str, tmp_path: Path) -> None:
    edgemerge.merge(recipe_of(method, [A]), tmp_path / "out.gguf")
    copy = edgemerge.make_recipe("passthrough", [(A, None)], out_type="F32")
    edgemerge.merge(copy, tmp_path / "copy.gguf")
    assert stored(tmp_path / "out.gguf") == stored(tmp_path / "copy.gguf")


@pytest.mark.parametrize(
    ("method", "models", "base", "message"),
    [
        ("model_stock", [A, B], None, "model_stock needs the base"),
        ("model_stock", [A], BASE, "takes at least 2 models besides the base, not 1"),
        ("nuslerp", [A, B, C], None, "nuslerp takes 2 models, not 3"),
        ("nuslerp", [A], BASE, "nuslerp takes 2 models besides the base, not 1"),
        ("arcee_fusion", [A, B], BASE, "arcee_fusion takes 1 model besides the base, not 2"),
        ("nearswap", [A], BASE, "nearswap needs the parameter t"),
    ],
)
def test_what_a_method_needs_is_said(
    method: str, models: list[str], base: str | None, message: str
) -> None:
    recipe = edgemerge.make_recipe(method, [(path, 0.5) for path in models], base=base)
    with pytest.raises(RecipeError, match=message):
        edgemerge.plan(recipe)


def test_a_filter_looks_at_hugging_face_names_before_gguf_s(tmp_path: Path) -> None:
    def weights(text: str) -> dict[str, Any]:
        rules = [{"filter": text, "value": 0.9}, {"value": 0.1}]
        path = tmp_path / "recipe.yml"
        models = [{"model": A, "parameters": {"weight": rules}}]
        models += [{"model": B, "parameters": {"weight": 1}}]
        path.write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
        jobs = edgemerge.plan(edgemerge.load_recipe(path)).jobs
        return {job.name: job.experts[0].settings["weight"] for job in jobs}

    found = weights("attn")  # self_attn, but no input_layernorm, which GGUF calls attn_norm
    assert (found["blk.0.attn_q.weight"], found["blk.0.attn_norm.weight"]) == (0.9, 0.1)
    found = weights("attn_norm")
    assert (found["blk.0.attn_q.weight"], found["blk.0.attn_norm.weight"]) == (0.1, 0.9)


def test_mergekits_recipe_has_its_parameters_and_is_told_in_words(tmp_path: Path) -> None:
    document = {
        "merge_method": "ramplus_tl",
        "base_model": BASE,
        "models": [{"model": A}, {"model": B}],
        "parameters": {
            "epsilon": 1e-4,
            "r": [{"filter": "mlp", "value": [0.1, 0.3]}, {"value": 0.2}],
        },
    }
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(document))
    recipe = edgemerge.load_recipe(path)
    settings = {job.name: job.settings for job in edgemerge.plan(recipe).jobs}
    assert settings["blk.1.ffn_up.weight"] == {"epsilon": 1e-4, "r": 0.3, "alpha": 0.2}
    assert settings["output.weight"]["r"] == 0.2
    assert describe_recipe(recipe_document(recipe)) == [
        "ramplus_tl: epsilon 0.0001, r 0.1 to 0.3 over the layers for mlp, else 0.2, "
        "alpha 0.2 (default)",
        "base base",
        "model a",
        "model b",
    ]
