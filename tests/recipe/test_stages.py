from __future__ import annotations

from pathlib import Path

import pytest

from edgemerge.errors import RecipeError
from edgemerge.recipe.presets import with_preset
from edgemerge.recipe.recipe import load_recipe
from edgemerge.recipe.stages import place_stages, stage_paths, with_settings
from edgemerge.types import Recipe

MIB = 1 << 20


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def linear(name: str | None, *models: str, more: str = "") -> str:
    listed = ", ".join(f"{{model: {model}}}" for model in models)
    named = f"name: {name}\n" if name is not None else ""
    return f"{named}merge_method: linear\nmodels: [{listed}]\n{more}"


def load(*documents: str) -> Recipe:
    Path("recipe.yml").write_text("---\n".join(documents))
    return load_recipe("recipe.yml")


def names(recipe: Recipe) -> list[str | None]:
    return [*(stage.name for stage in recipe.stages), recipe.name]


def test_stages_are_in_the_order_of_need(folder: Path) -> None:
    recipe = load(linear(None, "y", "a"), linear("y", "x", "b"), linear("x", "a", "b"))
    assert names(recipe) == ["x", "y", None]
    assert recipe.models() == (Path("y"), folder / "a")
    assert recipe.inputs() == (folder / "a", folder / "b")
    assert all(stage.out_type == "F32" for stage in recipe.stages)


def test_a_stage_may_give_tokens_alone(folder: Path) -> None:
    rules = "tokenizer: {source: y, tokens: {<x>: {source: x}}}\n"
    recipe = load(linear(None, "x", more=rules), linear("x", "a"), linear("y", "b"))
    assert sorted(map(str, names(recipe))) == ["None", "x", "y"]
    placed = place_stages(recipe, stage_paths(recipe, folder))
    assert placed.tokenizer_source == str(folder / "y.gguf")
    assert placed.tokens["<x>"].model == folder / "x.gguf"
    assert load(linear("x", "a"), linear(None, "b", more="tokenizer: {source: a}\n")).inputs() == (
        folder / "b",
        folder / "a",
    )


def test_where_all_have_names_the_last_that_no_other_takes_is_the_output() -> None:
    assert names(load(linear("x", "a"), linear("z", "x"), linear("y", "a"))) == ["y"]
    assert names(load(linear("x", "a"), linear("y", "x"))) == ["x", "y"]


def test_a_stage_that_is_not_needed_is_noted() -> None:
    recipe = load(linear("x", "a"), linear(None, "a", "b"))
    assert names(recipe) == [None]
    assert recipe.notes == ("the stage x is not made: the output does not need it",)


def test_a_stage_is_found_before_a_file_of_its_name() -> None:
    assert load(linear("a", "b"), linear(None, "a")).models() == (Path("a"),)


def test_a_stage_keeps_its_own_type_with_a_note_and_gets_the_outputs_budget() -> None:
    last = linear(None, "x", more="edgemerge: {memory: 300MiB}\n")
    stage = load(linear("x", "a", more="out_dtype: float16\n"), last).stages[0]
    assert (stage.out_type, stage.memory) == ("F16", 300 * MIB)
    assert stage.notes == ("its result is stored as F16, as its document says",)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ((linear("x", "a"), linear("x", "b")), "two documents have the name 'x'; give each stage"),
        ((linear(None, "a"), linear(None, "b")), "two documents have no name; give each stage a"),
        ((linear("x", "y"), linear("y", "x")), "the stage 'y' needs its own result; change the n"),
        ((linear("x", "x"), linear(None, "x")), "the stage 'x' needs its own result; change the "),
        ((linear("7", "a"), linear(None, "a")), "the name of document 1 is no plain text"),
        ((linear("x", "a+no"), linear(None, "x")), "models[0].model: no file or folder 'no'; down"),
        ((linear("x", "a"), linear(None, "x+b")), "models[0].model: an adapter is added to a mod"),
        (tuple(linear(f"s{i}", "a") for i in range(101)), "has 101 documents, more than 100; make"),
        ((linear("x", "a"), "[1]\n"), "is not a recipe: it needs keys such as merge_method"),
    ],
)
def test_a_mistake_is_named(documents: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(*documents)
    assert str(caught.value).removeprefix("recipe.yml: ").startswith(message)


def test_settings_reach_all_stages_and_presets_none() -> None:
    recipe = load(linear("x", "a"), linear(None, "x"))
    changed = with_settings(recipe, seed=3)
    assert (changed.seed, changed.stages[0].seed) == (3, 3)
    with pytest.raises(RecipeError, match="a preset is for one merge, not for several stages"):
        with_preset(recipe, "paper")


def test_files_of_stages_have_plain_and_different_names() -> None:
    recipe = load(linear("o/x", "a"), linear("o:x", "o/x"), linear(None, "o:x"))
    paths = stage_paths(recipe, Path("/f"))
    assert paths == {Path("o/x"): Path("/f/o-x.gguf"), Path("o:x"): Path("/f/o-x-.gguf")}
    assert place_stages(recipe, paths).models() == (Path("/f/o-x-.gguf"),)
    assert place_stages(recipe, paths).stages == ()


def test_a_stage_is_a_gguf_whatever_the_output_is() -> None:
    format_hf = "edgemerge: {format: hf}\n"
    recipe = load(linear("x", "a", "b", more=format_hf), linear(None, "x", "a", more=format_hf))
    (stage,) = recipe.stages
    assert (stage.out_format, recipe.out_format) == ("gguf", "hf")
    assert "format is that of the output alone; a stage is kept as a GGUF" in stage.notes
