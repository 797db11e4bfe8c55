from __future__ import annotations

from pathlib import Path

import pytest

from edgemerge.errors import RecipeError
from edgemerge.recipe.recipe import load_recipe
from edgemerge.recipe.searches import Choices, Range, SearchRecipe, load_search

RECIPE = """
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {weight: &w {search: [0, 1]}, density: 0.5}}
  - {model: b, parameters: {weight: *w, density: {search: [0.01, 1], log: true}}}
parameters:
  lambda:
    - {filter: mlp, value: [{search: [0.2, 1.5], start: 1}, 0.7, {search: [0.2, 1.5]}]}
    - {value: 0.7}
edgemerge: {type: {search: [Q4_K_M, Q8_0]}}
"""
HUGE = f"1{'0' * 400}"  # more than a float can be


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str, *, strict: bool = False) -> SearchRecipe:
    Path("recipe.yml").write_text(text)
    return load_search(Path("recipe.yml"), strict=strict)


def searching(weight: str) -> str:
    """A recipe in which the weight of a model is to be found so."""
    models = f"[{{model: a, parameters: {{weight: {weight}}}}}, {{model: b}}]"
    return f"merge_method: linear\nmodels: {models}\nparameters: {{weight: 1}}\n"


def test_what_is_to_be_found_is_listed_with_its_place() -> None:
    assert load(RECIPE).spaces == (
        Range("models[0].weight", 0.0, 1.0, False, 0.5),
        Range("models[1].density", 0.01, 1.0, True, 0.1),
        Range("lambda(mlp)[0]", 0.2, 1.5, False, 1.0),
        Range("lambda(mlp)[2]", 0.2, 1.5, False, 0.85),
        Choices("edgemerge.type", ("Q4_K_M", "Q8_0"), "Q4_K_M"),
    )


def test_values_are_put_in_place_and_an_alias_is_the_same_value() -> None:
    found = load(RECIPE)
    values = {**found.start(), "models[0].weight": 0.123456, "edgemerge.type": "Q8_0"}
    recipe = found.recipe(values)
    weights = [model.parameters["weight"][0].value for model in recipe.slices[0].inputs]
    assert weights == [0.1235, 0.1235]  # four digits, as the recipe is to show them
    assert [rule.value for rule in recipe.parameters["lambda"]] == [(1.0, 0.7, 0.85), 0.7]
    assert recipe.out_type == "Q8_0"
    assert found.fill(values)["parameters"]["lambda"][1] == {"value": 0.7}


@pytest.mark.parametrize("bounds", ["1.00001, 1.00002", "0.99996, 0.99998", "1000.1, 1000.4"])
def test_a_range_that_is_one_value_to_four_digits_is_refused(bounds: str) -> None:
    with pytest.raises(RecipeError, match="one value to 4 digits; give bounds further apart"):
        load(searching(f"{{search: [{bounds}]}}"))


def test_a_bound_of_more_digits_stays_in_its_range() -> None:
    found = load(searching("{search: [0.12344, 0.98766]}"))
    for value, shown in ((0.12344, 0.12344), (0.98766, 0.98766), (0.12345678, 0.1235)):
        models = found.fill({"models[0].weight": value})["models"]
        assert models[0]["parameters"]["weight"] == shown


def test_a_text_of_a_token_is_no_search() -> None:
    tokens = "tokenizer: {source: base, tokens: {search: {source: a}}}\n"
    found = load(RECIPE + tokens)
    assert len(found.spaces) == 5
    assert list(found.recipe(found.start()).tokens) == ["search"]


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        ("{search: 0.5}", r"the search of models\[0\].weight is 0.5; give \[LOW, HIGH\]"),
        ("{search: [0.1, 0.2, 0.3]}", "give \\[LOW, HIGH\\], two numbers, or a list of words"),
        ("{search: []}", "give \\[LOW, HIGH\\]"),
        ("{search: [0.1, x]}", "give \\[LOW, HIGH\\]"),
        ("{search: [x, x]}", "give \\[LOW, HIGH\\]"),
        ("{search: [.nan, 1]}", "give \\[LOW, HIGH\\]"),
        (f"{{search: [0, {HUGE}]}}", r"is \[0, 1000+\.\.\.; give \[LOW, HIGH\], two numbers"),
        (f"{{search: [0, 1], start: {HUGE}}}", r"is 1000+\.\.\.; give a number from 0 to 1"),
        ("{search: [1, 0.5]}", "goes from 1 to 0.5; give LOW < HIGH"),
        ("{search: [0, 1], log: true}", "needs a range above 0, not from 0"),
        ("{search: [0, 1], log: maybe}", "is 'maybe'; it must be true or false"),
        ("{search: [0, 1], start: 2}", "is 2; give a number from 0 to 1"),
        ("{search: [0, 1], strat: 1}", "unknown key 'strat'; did you mean 'start'"),
        ("{search: [x, y], start: z}", "is 'z', which is none of its words"),
        ("0.5", "has nothing to search; put"),
    ],
)
def test_a_malformed_search_is_one_sentence(weight: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        load(searching(weight))
    assert "\n" not in str(caught.value)


def test_a_filter_that_never_counts_is_refused() -> None:
    rules = "[{filter: mlp, value: {search: [0, 1]}}, {filter: mlp, value: {search: [0, 1]}}]"
    with pytest.raises(RecipeError, match=r"weight\(mlp\) is searched twice"):
        load(searching(rules))


def test_stages_are_searched_one_by_one() -> None:
    with pytest.raises(RecipeError, match="is not a recipe of one merge"):
        load(searching("{search: [0, 1]}") + "---\n" + searching("1"))


def test_a_key_that_stands_twice_is_a_note_and_a_strict_refusal() -> None:
    text = RECIPE + "base_model: a\n"
    found = load(text)
    said = "line 12: the key 'base_model' stands twice"
    assert found.recipe(found.start()).notes == (f"{said}, and the last one counts",)
    with pytest.raises(RecipeError, match=f"{said}; remove one of the two"):
        load(text, strict=True)


def test_a_place_that_takes_no_number_is_refused_before_any_trial() -> None:
    with pytest.raises(RecipeError, match="seed must be a whole number"):
        load(searching("{search: [0, 1]}") + "edgemerge: {seed: {search: [1, 9]}}\n")


def test_merge_says_that_a_search_is_to_be_found_first() -> None:
    Path("recipe.yml").write_text(RECIPE)
    with pytest.raises(
        RecipeError, match="has values that are to be found; give it to edgemerge s"
    ):
        load_recipe("recipe.yml")
