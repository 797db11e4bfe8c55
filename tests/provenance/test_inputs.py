"""Whether models are the inputs of a merge is told by the checksums that it left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgemerge.errors import EdgemergeError, VerificationError
from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.merging.run import merge
from edgemerge.methods.table import METHODS
from edgemerge.provenance.inputs import check_inputs
from edgemerge.provenance.verification import verify_model
from edgemerge.recipe.recipe import load_recipe, make_recipe
from tests.merging.test_outputs import recipe_of
from tests.provenance.test_verification import replace_value
from tests.support.small_models import edit_hub, write_gguf


@pytest.fixture
def models(golden_dir: Path) -> list[Path]:
    return [golden_dir / "inputs_f32" / name for name in ("base", "a", "b")]


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.align == "off"])
def test_the_inputs_of_each_method(method: str, models: list[Path], tmp_path: Path) -> None:
    recipe = recipe_of(method, [str(path) for path in models], "Q8_0")
    merge(recipe, tmp_path / "out.gguf", threads=2)
    check_inputs(tmp_path / "out.gguf", recipe.models()[::-1])


def test_inputs_in_several_files_and_slices(models: list[Path], tmp_path: Path) -> None:
    """Layers of two models one after the other, one of them a split GGUF."""
    merge(
        make_recipe("passthrough", [(str(models[1]), None)]), tmp_path / "s.gguf", split_bytes=9000
    )
    part = next(tmp_path.glob("s-00002-*"))
    slices = [
        {"sources": [{"model": str(part), "layer_range": [0, 2]}]},
        {"sources": [{"model": str(models[2]), "layer_range": [1, 2]}]},
    ]
    (tmp_path / "r.yml").write_text(json.dumps({"merge_method": "passthrough", "slices": slices}))
    merge(load_recipe(tmp_path / "r.yml"), tmp_path / "out.gguf")
    check_inputs(tmp_path / "out.gguf", [next(tmp_path.glob("s-00001-*")), models[2]])
    with pytest.raises(VerificationError, match=r"was made of s\.gguf, b; give all of them"):
        check_inputs(tmp_path / "out.gguf", [models[2]])


def test_another_model_of_that_name(models: list[Path], tmp_path: Path) -> None:
    recipe = make_recipe("linear", [(str(path), None) for path in models[1:]])
    merge(recipe, tmp_path / "out.gguf")
    other = edit_hub(models[1], tmp_path / "a", lambda name, x: x + ("norm" in name))
    with pytest.raises(VerificationError, match=r"/a: is not the input of that name"):
        check_inputs(tmp_path / "out.gguf", [other, models[2]])


def test_names_that_do_not_fit(models: list[Path], tmp_path: Path) -> None:
    recipe = make_recipe("linear", [(str(path), None) for path in models[1:]])
    merge(recipe, tmp_path / "out.gguf")
    copy = Path(shutil.copytree(models[1], tmp_path / "other" / "a"))
    for given, sentence in {
        (models[1],): r"was made of a, b; give all of them with --input \(b is missing\)",
        (*models,): "base is none of these, leave it out",
        (*models[1:], copy): "inputs of one name",
    }.items():
        with pytest.raises(VerificationError, match=sentence):
            check_inputs(tmp_path / "out.gguf", given)


def test_what_does_not_allow_to_tell(models: list[Path], tmp_path: Path) -> None:
    recipe = make_recipe("hierarchical", [(str(models[1]), None)], base=str(models[0]))
    merge(recipe, tmp_path / "out.gguf")
    with pytest.raises(VerificationError, match="was aligned before it was merged"):
        check_inputs(tmp_path / "out.gguf", models[:2])
    plain = write_gguf(tmp_path / "plain.gguf", {"output_norm.weight": np.ones(8, np.float32)})
    with pytest.raises(VerificationError, match="has no provenance section"):
        check_inputs(plain, [])


@pytest.mark.parametrize(
    "change",
    [
        "",
        "7",
        "[" * 5000,
        "\xff",
        {"method": "none"},
        {"method": ["linear"]},
        {"slices": []},
        {"slices": [{"inputs": [], "parameters": {}}]},
        {"slices": [[]]},
        {"slices": 7},
        {"base": "c"},
        {"base": {}},
        {"base": "b"},
        {"parameters": {"weight": [{"value": None, "filter": None}]}},
        {"parameters": []},
        {"defaults": {}},
        {"align": 7},
    ],
)
def test_a_recipe_that_another_program_changed(
    models: list[Path], tmp_path: Path, change: str | dict
) -> None:
    recipe = make_recipe("linear", [(str(path), None) for path in models[1:]])
    merge(recipe, tmp_path / "out.gguf")
    stated = json.loads(verify_model(tmp_path / "out.gguf").provenance.recipe)
    text = change if isinstance(change, str) else json.dumps(stated | change)
    changed = replace_value(tmp_path / "out.gguf", "edgemerge.recipe", encode_value(text, "str"))
    with pytest.raises(EdgemergeError) as caught:
        check_inputs(changed, models[1:])
    assert str(caught.value).isprintable()


MANY_DIGITS = "1" * 400


@pytest.mark.parametrize(
    ("key", "stated"),
    [
        ("seed", "1e999"),
        ("slices", '[{"inputs": [{"path": "a", "layer_range": [0, 1e999]@}]@}]'),
        ("slices", '[{"inputs": [{"path": "a", "layer_range": [-1e6, 1]@}]@}]'),
        ("parameters", f'{{"weight": [{{"value": [1, {MANY_DIGITS}], "filter": null}}]}}'),
        ("parameters", f'{{"weight": [{{"value": {MANY_DIGITS}, "filter": null}}]}}'),
    ],
)
def test_numbers_that_are_too_large(
    models: list[Path], tmp_path: Path, key: str, stated: str
) -> None:
    """Fault: a stranger's number beyond a float gave a traceback, and a range of many layers took memory."""
    merge(make_recipe("linear", [(str(models[1]), None)]), tmp_path / "out.gguf")
    recipe = json.loads(verify_model(tmp_path / "out.gguf").provenance.recipe)
    text = json.dumps(recipe | {key: "@"}).replace('"@"', stated.replace("@", ', "parameters": {}'))
    changed = replace_value(tmp_path / "out.gguf", "edgemerge.recipe", encode_value(text, "str"))
    with pytest.raises(VerificationError, match="states a recipe that this edgemerge cannot read"):
        check_inputs(changed, models[1:2])
