"""Configurations of mergekit-moe: what is read of them, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgemerge.errors import RecipeError
from edgemerge.experts import MIXTURE_PATH, ExpertInput, Mixture
from edgemerge.recipe.recipe import load_recipe
from edgemerge.recipe.words import describe_recipe, recipe_document

PROMPTED = "experts:\n- {source_model: a, positive_prompts: [x]}\n"
PROMPTED += "- {source_model: b, positive_prompts: [y]}\n"
CHEAP = f"base_model: base\ngate_mode: cheap_embed\n{PROMPTED}"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)


def write(text: str) -> Path:
    path = Path("recipe.yml")
    path.write_text(text)
    return path


def test_a_mixture_is_a_copy_of_one_model_that_is_made_of_others() -> None:
    text = (
        "base_model: base\ngate_mode: cheap_embed\nexperts_per_token: 1\ndtype: float32\nexperts:\n"
        "- {source_model: a, positive_prompts: [x, z], negative_prompts: [y]}\n"
        "- {source_model: {model: b}, positive_prompts: [y], residual_scale: 0.5}\n"
        "edgemerge: {type: Q8_0, seed: 7}\n"
    )
    recipe = load_recipe(write(text))
    base, a, b = (Path(name).resolve() for name in ("base", "a", "b"))
    experts = (ExpertInput(a, ("x", "z"), ("y",)), ExpertInput(b, ("y",), (), 0.5))
    assert recipe.mixture == Mixture(base, experts, "cheap_embed", 1)
    assert (recipe.method, recipe.title, recipe.models()) == (
        "passthrough",
        "mixture",
        (MIXTURE_PATH,),
    )
    assert (recipe.out_type, recipe.dtype, recipe.seed) == ("Q8_0", "float32", 7)
    assert recipe.inputs() == (base, a, b)
    assert describe_recipe(recipe_document(recipe)) == [
        "mixture: 1 experts for a token, gate_mode cheap_embed",
        "base base",
        "expert a: 'x', 'z', not 'y'",
        "expert b: 'y', residual_scale 0.5",
    ]


def test_random_gates_need_no_prompts_and_two_experts_compute_a_token() -> None:
    recipe = load_recipe(
        write("base_model: a\ngate_mode: random\nexperts: [{source_model: a}, {source_model: a}]\n")
    )
    assert recipe.mixture is not None
    assert recipe.mixture.experts_per_token == 2
    assert recipe.notes[0].startswith("all experts are one model")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (PROMPTED, "base_model is missing: it gives all but the experts"),
        (
            "base_model: base\nexperts: [{source_model: a}]\n",
            "experts[0].positive_prompts is missing",
        ),
        (
            CHEAP.replace("cheap_embed", "hidden_avg"),
            "gate_mode hidden_avg takes the mean over the padding",
        ),
        (CHEAP.replace("cheap_embed", "warm"), "gate_mode is 'warm'; choose one of hidden,"),
        (CHEAP.replace("[y]", "[x]"), "experts all have the same prompts"),
        (CHEAP.replace("[y]", "[]"), "experts[1].positive_prompts is missing"),
        (
            CHEAP.replace("[y]", "y"),
            "experts[1].positive_prompts must be a list of texts, as in ['y']",
        ),
        (CHEAP.replace("[y]", "[1]"), "experts[1].positive_prompts must be a list of texts"),
        (
            CHEAP.replace("{source_model: b,", "{"),
            "experts[1].source_model must be the path of a model",
        ),
        (CHEAP.replace("[y]}", "[y], noise_scale: 0.1}"), "experts[1].noise_scale adds noise"),
        (
            CHEAP.replace("[y]}", "[y], residual_scale: x}"),
            "experts[1].residual_scale must be a number",
        ),
        (
            f"{CHEAP}experts_per_token: 3\n",
            "experts_per_token is 3; it must be a whole number from 1",
        ),
        (f"{CHEAP}shared_experts: [{{source_model: a}}]\n", "shared_experts asks for a Qwen2-MoE"),
        (f"{CHEAP}architecture: deepseek\n", "architecture asks for a Qwen2-MoE or DeepSeek model"),
        (f"{CHEAP}architecture: gpt\n", "architecture is 'gpt'; leave it out, or write mixtral"),
        (f"{CHEAP}edgemerge: {{align: hard}}\n", "edgemerge has the unknown key 'align'"),
        (f"{CHEAP}---\nmerge_method: linear\n", "has a mixture of experts beside other documents"),
    ],
)
def test_a_mistake_is_named(text: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(write(text))
    assert sentence in str(error.value)


def test_an_unknown_key_is_a_note_that_names_the_nearest() -> None:
    recipe = load_recipe(write(f"{CHEAP}experts_per_tokn: 2\nmemory: 100MiB\n"))
    assert recipe.notes == (
        "the recipe has the unknown key 'experts_per_tokn', which is ignored; did you mean "
        "'experts_per_token'?",
        "the recipe has the unknown key 'memory', which is ignored; it belongs under edgemerge",
    )


@pytest.mark.parametrize("wanted", ["mixtral", "Mixtral", "qwen3"])
def test_an_architecture_may_be_named(wanted: str) -> None:
    assert load_recipe(write(f"{CHEAP}architecture: {wanted}\n")).mixture is not None


def test_a_mixture_may_be_a_directory() -> None:
    assert load_recipe(write(CHEAP + "edgemerge: {format: hf}\n")).out_format == "hf"
    assert load_recipe(write(CHEAP)).out_format == "gguf"
    with pytest.raises(RecipeError, match="format"):
        load_recipe(write(CHEAP + "edgemerge: {format: x}\n"))
