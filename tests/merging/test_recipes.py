"""Whole recipes: our own of every key, and public ones where their facts are at hand."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import yaml

import edgemerge
from edgemerge.errors import RecipeError
from edgemerge.recipe.templates import CHAT_TEMPLATES
from tests.support.places import ROOT
from tests.support.small_models import Float32, load_gguf

RECIPES = sorted((ROOT / "tests" / "data" / "recipes").glob("*.yml"))
SHARED = ROOT.parent / "shared" / "recipes"
NO_SHARED = "the facts of public recipes are not beside this checkout"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden_dir: Path) -> Path:
    """Working directory with the golden models under their names."""
    for name in ("base", "a", "b", "c"):
        (tmp_path / name).symlink_to(golden_dir / "inputs_f32" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merge(text: str, folder: Path) -> dict[str, Float32]:
    (folder / "recipe.yml").write_text(text)
    edgemerge.merge(edgemerge.load_recipe("recipe.yml"), "out.gguf", force=True)
    return load_gguf(folder / "out.gguf")


def stored_recipe(name: str) -> str:
    return (ROOT / "tests" / "data" / "recipes" / f"{name}.yml").read_text()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_every_key_merges(folder: Path, path: Path) -> None:
    tensors = merge(path.read_text(), folder)
    assert len(tensors) >= 21


SAME = {
    "modules_of_models": "merge_method: task_arithmetic\nbase_model: base\nmodels:\n"
    "- {model: a, parameters: {weight: 0.5}}\n- {model: b, parameters: {weight: 0.25}}\n",
    "references": "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1}}\n"
    "- {model: b, parameters: {weight: 2}}\n- {model: c, parameters: {weight: 3}}\n",
    "strays": "merge_method: task_arithmetic\nbase_model: base\nparameters: {lambda: 0.5}\nmodels:\n"
    "- {model: a, parameters: {weight: 0.5}}\n- {model: b, parameters: {weight: 0.2}}\n",
    "aliases": "merge_method: task_arithmetic\nbase_model: base\nmodels:\n"
    "- {model: a, parameters: {weight: 0.5}}\n- {model: b, parameters: {weight: 0.5}}\n"
    "- {model: c, parameters: {weight: 0.1}}\n",
    "base_as_model": "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 2}}\n"
    "- {model: b, parameters: {weight: 1}}\n- {model: base, parameters: {weight: 1}}\n",
    "steps": "merge_method: linear\nparameters: {normalize: [{filter: layers.1, value: true}, "
    "{value: false}]}\nmodels:\n- {model: a, parameters: {weight: 0.1}}\n"
    "- {model: b, parameters: {weight: [0.4, 0.9]}}\n- {model: c, parameters: {weight: 0.2}}\n",
}


@pytest.mark.parametrize("name", SAME)
def test_two_ways_to_say_it_merge_alike(folder: Path, name: str) -> None:
    left = merge(stored_recipe(name), folder)
    right = merge(f"{SAME[name]}dtype: float32\n", folder)
    assert left.keys() == right.keys()
    assert all(np.array_equal(left[tensor], right[tensor]) for tensor in right)


def test_each_slice_is_merged_onto_its_own_base(folder: Path) -> None:
    found = merge(stored_recipe("slice_bases"), folder)
    base, a, b, c = (load_one(folder, name) for name in ("base", "a", "b", "c"))
    first, second = "blk.0.ffn_up.weight", "blk.1.ffn_up.weight"
    np.testing.assert_allclose(
        found[first], base[first] + 0.7 * (a[first] - base[first]), atol=1e-6
    )
    np.testing.assert_allclose(found[second], b[second] + 0.4 * (c[first] - b[second]), atol=1e-6)
    np.testing.assert_allclose(found["output_norm.weight"], b["output_norm.weight"] + 0.4 * (
        c["output_norm.weight"] - b["output_norm.weight"]), atol=1e-6)  # fmt: skip


def load_one(folder: Path, name: str) -> dict[str, Float32]:
    return merge(
        f"merge_method: passthrough\nmodels: [{{model: {name}}}]\ndtype: float32\n", folder
    )


def template_of(folder: Path) -> str | None:
    field = gguf.GGUFReader(folder / "out.gguf").fields.get("tokenizer.chat_template")
    return None if field is None else str(field.contents())


def give_template(folder: Path, name: str, template: str) -> None:
    target = (folder / name).resolve()
    (folder / name).unlink()
    shutil.copytree(target, folder / name)
    path = folder / name / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))


def test_auto_is_the_template_that_most_inputs_have(folder: Path) -> None:
    """Fault: it was the tokenizer source's own."""
    for name, template in {
        "base": "{{ 1 }}",
        "a": "\n{{ 2 }}",
        "b": "{{ 3 }}",
        "c": "{{ 2 }}\n",
    }.items():
        give_template(folder, name, template)
    text = "merge_method: linear\nmodels: [{model: base}, {model: b}, {model: a}%s]\n"
    text += "parameters: {weight: 1}\nchat_template: auto\n"
    (folder / "recipe.yml").write_text(text % ", {model: c}")
    report = edgemerge.merge(edgemerge.load_recipe("recipe.yml"), "out.gguf")
    assert template_of(folder) == "{{ 2 }}"
    assert (
        "chat_template auto: the template of a is taken, which 2 of 4 models have" in report.notes
    )
    merge(text % "", folder)
    assert template_of(folder) == "{{ 1 }}"  # of the first where all are as common


def test_a_chat_template_that_does_not_parse_is_told(folder: Path) -> None:
    """Fault: it was copied without a word, and chat refused the merge."""
    pytest.importorskip("jinja2")
    give_template(folder, "base", "{% for message in messages %}{{ message }}")
    text = "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: a}]\n"
    text += "parameters: {weight: 1}\n"
    (folder / "recipe.yml").write_text(text)
    recipe = edgemerge.load_recipe("recipe.yml")
    (said,) = [one for one in edgemerge.plan(recipe).notes if "chat template" in one]
    assert said.startswith("base: its chat template is no Jinja (Unexpected end of template.")
    assert said.endswith(
        "), so run, chat and serve will refuse the output; give another as chat_template of a recipe"
    )
    assert said in edgemerge.merge(recipe, "out.gguf").notes
    (folder / "recipe.yml").write_text(text + "chat_template: '{{ messages'\n")
    notes = edgemerge.plan(edgemerge.load_recipe("recipe.yml")).notes
    assert any(one.startswith("the chat_template is no Jinja (") for one in notes)
    (folder / "recipe.yml").write_text(text + "chat_template: chatml\n")
    assert not any(
        "no Jinja" in one for one in edgemerge.plan(edgemerge.load_recipe("recipe.yml")).notes
    )


def test_auto_adds_no_template_where_no_input_has_one(folder: Path) -> None:
    merge(
        "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: 1}\nchat_template: auto\n",
        folder,
    )
    assert template_of(folder) is None
    merge(stored_recipe("tokens"), folder)
    assert template_of(folder) == CHAT_TEMPLATES["chatml"]


# -- public recipes ----------------------------------------------------------------------------------


def read_facts() -> list[dict[str, Any]]:
    path = SHARED / "recipes.json"
    return json.loads(path.read_text()) if path.is_file() else []


# Recipes that are refused, and by what words. mergekit refuses the first two as well.
REFUSED = {
    "r59": "experts all have the same prompts",
    "r60": "experts all have the same prompts",
    "r62": "shared_experts",
    "m10": "is a configuration of mergekit-evolve",
}


@pytest.fixture(scope="module")
def public_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins for the models of public recipes, of every depth."""
    folder = tmp_path_factory.mktemp("public")
    depths = sorted({str(facts["layers"]) for facts in read_facts()})
    subprocess.run([sys.executable, SHARED / "make_models.py", folder, *depths], check=True)
    return folder


def place(facts: dict[str, Any], models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(models / f"L{facts['layers']}")
    path = Path(f"{facts['id']}.yml")
    path.write_text(facts["raw"] or yaml.safe_dump_all(facts["docs"], sort_keys=False))
    return path


@pytest.mark.skipif(not SHARED.is_dir(), reason=NO_SHARED)
def test_public_recipes_are_planned_or_refused_by_name(
    public_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for facts in read_facts():
        path = place(facts, public_models, monkeypatch)
        if facts["id"] not in REFUSED:
            edgemerge.plan(edgemerge.load_recipe(path))
        else:
            with pytest.raises(RecipeError, match=REFUSED[facts["id"]]):
                edgemerge.plan(edgemerge.load_recipe(path))


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason=NO_SHARED)
@pytest.mark.parametrize("facts", read_facts(), ids=lambda facts: facts["id"])
def test_a_public_recipe_merges(
    facts: dict[str, Any], public_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if facts["id"] in REFUSED:
        pytest.skip("it is refused")
    path = place(facts, public_models, monkeypatch)
    report = edgemerge.merge(edgemerge.load_recipe(path), "out.gguf", force=True)
    assert report.tensors > 9 * facts["layers"] // 2
    Path("out.gguf").unlink()
