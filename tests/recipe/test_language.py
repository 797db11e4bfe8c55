"""mergekit's language: what counts, what is ignored with a note, what is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgemerge.errors import RecipeError
from edgemerge.formats.adapters.reference import model_name, split_reference
from edgemerge.recipe.recipe import load_recipe, make_recipe
from edgemerge.recipe.templates import CHAT_TEMPLATES
from edgemerge.token_rows import TokenRule
from edgemerge.types import ModelInput, Recipe, Rule, Slice

TIES = "merge_method: ties\nbase_model: base\nmodels:\n- model: a\n- model: b\n"
LINEAR = "merge_method: linear\nmodels: [{model: a}, {model: b}]\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working directory with models, as far as a recipe looks at them."""
    for name in ("base", "a", "b", "c", "c++", "d@1"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str, *, strict: bool = False) -> Recipe:
    Path("recipe.yml").write_text(text)
    return load_recipe("recipe.yml", strict=strict)


def refusal(text: str, *, strict: bool = False) -> str:
    with pytest.raises(RecipeError) as caught:
        load(text, strict=strict)
    return str(caught.value).removeprefix("recipe.yml: ")


# -- what mergekit ignores -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "note", "refused"),
    [
        (
            TIES + "dtpye: float16\n",
            "the recipe has the unknown key 'dtpye', which is ignored; did you mean 'dtype'?",
            "the recipe has the unknown key 'dtpye'; did you mean 'dtype'?",
        ),
        (
            TIES + "allow_negative_weights: true\n",
            "the recipe has the unknown key 'allow_negative_weights', which is ignored",
            "the recipe has the unknown key 'allow_negative_weights'; known are merge_method",
        ),
        (
            TIES + "normalize: true\n",
            "the recipe has the unknown key 'normalize', which is ignored; it belongs under parameters",
            "the recipe has the unknown key 'normalize'; known are",
        ),
        (
            TIES + "pad_to_multiple_of: 8\n",
            "the recipe has the unknown key 'pad_to_multiple_of', which is ignored; it belongs under "
            "tokenizer",
            "the recipe has the unknown key 'pad_to_multiple_of'; known are",
        ),
        (
            TIES + "memory: 1GiB\n",
            "the recipe has the unknown key 'memory', which is ignored; it belongs under edgemerge",
            "the recipe has the unknown key 'memory'; known are",
        ),
        (
            TIES + "parameters: {lamda: 0.85}\n",
            "parameters has the unknown parameter 'lamda', which is ignored; did you mean 'lambda'?",
            "parameters has the unknown parameter 'lamda'; did you mean 'lambda'?",
        ),
        (
            TIES + "- model: c\n  weight: 1\n",
            "models[2] has the unknown key 'weight', which is ignored; it belongs under its parameters",
            "models[2] has the unknown key 'weight'; known are model, parameters",
        ),
        (
            "merge_method: passthrough\n"
            "slices: [{sources: [{model: a, revision: x, layer_range: [0, 1]}]}]\n",
            "slices[0].sources[0] has the unknown key 'revision', which is ignored",
            "slices[0].sources[0] has the unknown key 'revision'; known are",
        ),
        (
            TIES + "tokenizer: {sources: a}\n",
            "tokenizer has the unknown key 'sources', which is ignored; did you mean 'source'?",
            "tokenizer has the unknown key 'sources'; did you mean 'source'?",
        ),
        (
            TIES + "parameters: {density: [{filter: mlp, value: 1, when: 2}, {value: 1}]}\n",
            "parameters.density has the unknown key 'when', which is ignored",
            "parameters.density has the unknown key 'when'; known are filter, value",
        ),
        (
            TIES + "base_model: c\n",
            "line 6: the key 'base_model' stands twice, and the last one counts",
            "line 6: the key 'base_model' stands twice; remove one of the two",
        ),
    ],
)
def test_a_stray_is_a_note_and_a_strict_refusal(text: str, note: str, refused: str) -> None:
    assert load(text).notes == (note,)
    assert refusal(text, strict=True).startswith(refused)


def test_a_stray_changes_nothing_and_the_last_duplicate_counts(folder: Path) -> None:
    assert load(TIES + "dtpye: float16\nparameters: {wieght: 3}\n").parameters == {}
    assert load(TIES + "base_model: c\n").base == folder / "c"


def test_many_strays_are_counted() -> None:
    text = TIES + "".join(f"k{i}: 1\n" for i in range(15)) + "k0: 2\n" * 14
    notes = load(text).notes
    assert len(notes) == 2 * 11
    assert notes[10] == "4 more keys stand twice"
    assert notes[-1] == "the recipe has 5 more unknown keys"


def test_our_own_table_and_flags_stay_exact() -> None:
    assert refusal(TIES + "edgemerge: {qtype: Q8_0}\n").startswith(
        "edgemerge has the unknown key 'q"
    )
    with pytest.raises(RecipeError, match="-P has the unknown parameter 'densty'; did you mean"):
        make_recipe("ties", [("a", None)], base="base", parameters={"densty": 1})


# -- values ----------------------------------------------------------------------------------------


def test_filters_alone_null_and_star() -> None:
    text = (
        TIES + "parameters: {weight: {filter: mlp, value: [0, 1]}, "
        "density: [{filter: null, value: 0.5}], lambda: [{filter: '*', value: 2}]}\n"
    )
    assert load(text).parameters == {
        "weight": (Rule((0.0, 1.0), "mlp"),),
        "density": (Rule(0.5),),
        "lambda": (Rule(2.0),),
    }


def test_switches_and_words_follow_each_other_over_the_layers() -> None:
    recipe = load(TIES + "parameters: {normalize: [true, false], rescale: [l1, expectation]}\n")
    assert recipe.parameters == {
        "normalize": (Rule((True, False)),),
        "rescale": (Rule(("l1", "expectation")),),
    }


def test_an_empty_list_says_nothing() -> None:
    recipe = load(TIES + "parameters: {weight: []}\n")
    assert recipe.parameters == {"weight": ()}
    assert recipe.notes == ("parameters.weight is an empty list, which says nothing",)


def test_aliases_and_merge_keys() -> None:
    recipe = load(
        "merge_method: linear\nmodels:\n- {model: a, parameters: &p {weight: 0.5}}\n"
        "- {model: b, parameters: *p}\n- {model: c, parameters: {<<: *p, weight: 2}}\n"
    )
    weights = [model.parameters["weight"] for model in recipe.slices[0].inputs]
    assert weights == [(Rule(0.5),), (Rule(0.5),), (Rule(2.0),)]
    assert recipe.notes == ()


@pytest.mark.parametrize(("dtype", "read"), [("float64", "float64"), ("torch.float16", "float16")])
def test_working_types(dtype: str, read: str) -> None:
    recipe = load(LINEAR + f"dtype: {dtype}\n")
    assert recipe.dtype == read
    said = "dtype float64: arithmetic is float32, and sums over a tensor are float64"
    assert recipe.notes == ((said,) if read == "float64" else ())


def test_float64_is_not_written() -> None:
    recipe = load(LINEAR + "out_dtype: float64\n")
    assert recipe.out_type == "F32"
    assert recipe.notes == ("out_dtype float64 is not written; the output is F32",)


# -- models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        "base+lora1",
        "{model: {path: base}, lora: {path: lora1}}",
        "{model: base, lora: lora1}",
        "{model: {path: base, revision: x}, lora: {path: lora1, revision: y}}",
    ],
)
def test_an_adapter_is_never_dropped_in_silence(model: str) -> None:
    found = refusal(f"merge_method: linear\nmodels: [{{model: {model}}}]\n")
    missing = "no file or folder 'lora1'; download the LoRA adapter and give its path"
    assert found == f"models[0].model: {missing}"
    assert refusal(LINEAR + f"base_model: {model}\n") == f"base_model: {missing}"


@pytest.mark.parametrize(
    ("model", "added"),
    [
        ("a+b", [("b", 1.0)]),
        ("{model: {path: a}, lora: {path: b}}", [("b", 1.0)]),
        ("{model: a, lora: b}", [("b", 1.0)]),
        ("a+0.5*b+-1e-1*base", [("b", 0.5), ("base", -0.1)]),
        (
            "{model: a, lora: [b, {path: d@1, weight: 0.5}, {path: c++}]}",
            [("b", 1.0), ("d@1", 0.5)],
        ),
    ],
)
def test_adapters_are_part_of_a_model(
    folder: Path, model: str, added: list[tuple[str, float]]
) -> None:
    recipe = load(f"merge_method: linear\nmodels: [{{model: {model}}}]\n")
    (path,) = recipe.models()
    reference = split_reference(path)
    assert reference is not None
    assert reference.base == folder / "a"
    found = [(use.path, use.weight) for use in reference.adapters[: len(added)]]
    assert found == [(folder / name, weight) for name, weight in added]
    assert model_name(path).startswith(f"a+{'' if added[0][1] == 1 else '0.5*'}b")


@pytest.mark.parametrize("model", ["a@v2", "{model: a@v2}", "{model: {path: a, revision: v2}}"])
def test_a_revision_is_never_dropped_in_silence(folder: Path, model: str) -> None:
    recipe = load(f"merge_method: linear\nmodels: [{{model: {model}}}]\n")
    assert recipe.models() == (folder / "a",)
    assert recipe.notes == (
        "models[0].model: the revision 'v2' does not apply to a local path; a is taken as it is",
    )
    assert make_recipe("linear", [("a@v2", None)]).notes[0].startswith("model: the revision 'v2'")


def test_a_name_may_have_a_plus_or_an_at(folder: Path) -> None:
    recipe = load("merge_method: linear\nmodels: [{model: c++}, {model: d@1}]\n")
    assert recipe.models() == (folder / "c++", folder / "d@1")
    assert recipe.notes == ()


@pytest.mark.parametrize(
    "model",
    [
        *(
            "a@1@2",
            "a+",
            "{path: a}",
            "{model: {path: 7}}",
            "{model: a, lora: 7}",
            "a+b@1@2",
            "a++b",
        ),
        *("{model: a, lora: {path: b, weight: x}}", "{model: a, lora: [b, 7]}"),
    ],
)
def test_what_is_no_reference(model: str) -> None:
    found = refusal(f"merge_method: linear\nmodels: [{{model: {model}}}]\n")
    assert found == (
        "models[0].model must be the path of a model, as in PATH, PATH@REVISION or PATH+ADAPTER"
    )


def test_a_base_of_a_slice_and_a_residual_weight(folder: Path) -> None:
    recipe = load(
        "merge_method: task_arithmetic\nslices: [{base_model: base, residual_weight: 0.5, "
        "sources: [{model: a, layer_range: [0, 1]}]}]\n"
    )
    assert recipe.slices == (Slice((ModelInput(folder / "a", (0, 1)),), {}, folder / "base"),)
    assert recipe.models() == (folder / "base", folder / "a")
    assert recipe.notes == ("slices[0].residual_weight has no effect, as in mergekit",)


def test_linear_takes_a_base_that_has_a_weight_for_a_model(folder: Path) -> None:
    given = "merge_method: linear\nbase_model: base\nmodels: [{model: a}]\n"
    assert load(given + "parameters: {weight: 1}\n").slices[0].inputs[-1].path == folder / "base"
    assert len(load(given).slices[0].inputs) == 1  # mergekit refuses it: the base has no weight


# -- modules ---------------------------------------------------------------------------------------


def test_modules_are_models_or_slices_with_a_level_of_parameters() -> None:
    recipe = load(
        "merge_method: ties\nbase_model: base\nparameters: {density: 0.5, weight: 1}\nmodules:\n"
        "  default: {models: [{model: a}], parameters: {weight: [{filter: mlp, value: 2}]}}\n"
    )
    assert recipe.parameters == {
        "weight": (Rule(2.0, "mlp"), Rule(1.0)),
        "density": (Rule(0.5),),
    }


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (
            "{vision_tower: {models: [{model: a}]}}",
            "modules names 'vision_tower', and only the lang",
        ),
        (
            "{default: 1, text_decoder: 1}",
            "modules names 'default', 'text_decoder', and only the l",
        ),
        ("{default: {parameters: {}}}", "modules.default needs either models or slices, one of th"),
        ("{default: {models: [{model: q}]}}", "modules.default.models[0].model: no file or folder"),
        ("[1]", "modules must be a table of keys and values"),
    ],
)
def test_a_mistake_in_modules_is_named(modules: str, message: str) -> None:
    assert refusal(f"merge_method: linear\nmodules: {modules}\n").startswith(message)


# -- tokens ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "source"),
    [("{}", "union"), ("{source: base}", "base"), ("{source: a}", "a"), ("", None)],
)
def test_the_tokenizer_table(folder: Path, table: str, source: str | None) -> None:
    wanted = str(folder / "a") if source == "a" else source
    assert load(TIES + f"tokenizer: {table}\n").tokenizer_source == wanted


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("{tokens: {<|x|>: a}}", "tokenizer.tokens.<|x|> must be a table"),
        ("{tokens: {x: {force: true}}}", "tokenizer.tokens.x has force without a source"),
        ("{tokens: {x: {source: {kind: one}}}}", "tokenizer.tokens.x has the kind 'one'; choose"),
        ("{tokens: {x: {source: {kind: [y]}}}}", "tokenizer.tokens.x has the kind ['y']; choose"),
        ("{tokens: {x: {source: {kind: {}}}}}", "tokenizer.tokens.x has the kind {}; choose"),
        (
            "{tokens: {x: {source: {kind: model_token, model: a}}}}",
            "tokenizer.tokens.x needs either token or token_id, one of the two",
        ),
        (
            "{tokens: {x: {source: {kind: model_token, model: a, token_id: -1}}}}",
            "tokenizer.tokens.x has the token_id -1, which is no number",
        ),
        ("{tokens: {x: {source: q}}}", "tokenizer.tokens.x.source: no file or folder 'q'"),
        ("{pad_to_multiple_of: 1.5}", "tokenizer.pad_to_multiple_of is 1.5; it must be a whole"),
        ("{source: q}", "tokenizer.source: no file or folder 'q'"),
        ("union", "tokenizer must be a table of keys and values"),
        (
            "{}\ntokenizer_source: base",
            "has both tokenizer_source and tokenizer; keep one of the t",
        ),
    ],
)
def test_a_mistake_in_the_tokenizer_is_named(table: str, message: str) -> None:
    assert refusal(TIES + f"tokenizer: {table}\n").startswith(message)


def test_rules_for_single_tokens_and_padding(folder: Path) -> None:
    recipe = load(
        TIES + "tokenizer:\n  source: union\n  pad_to_multiple_of: 64\n  tokens:\n"
        "    w: {}\n    x: {source: a, force: true}\n    y: {source: {kind: zero}}\n"
        "    z: {source: {kind: model_token, model: b, token: w}}\n"
        "    id: {source: {kind: model_token, model: {model: {path: b}}, token_id: 7}}\n"
    )
    assert recipe.pad_to_multiple_of == 64
    assert recipe.tokens == {
        "w": TokenRule("default"),
        "x": TokenRule("model", folder / "a", force=True),
        "y": TokenRule("zero"),
        "z": TokenRule("model", folder / "b", "w"),
        "id": TokenRule("model", folder / "b", 7),
    }
    assert load(TIES + "tokenizer: {pad_to_multiple_of: 0}\n").pad_to_multiple_of is None


def test_a_chat_template_by_name_as_text_and_auto() -> None:
    for name, text in CHAT_TEMPLATES.items():
        assert load(TIES + f"chat_template: {name}\n").chat_template == text
    assert load(TIES + "chat_template: auto\n").chat_template == "auto"
    assert load(TIES + "chat_template: '{{ x }}'\n").chat_template == "{{ x }}"
    assert load(TIES + "chat_template: ''\n").chat_template is None
    assert "or one of alpaca, chatml, exaone, llama3, mistral" in refusal(
        TIES + "chat_template: gpt\n"
    )


# -- other programs' configurations ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("genome: {models: [a]}\ntasks: []\n", "is a configuration of mergekit-evolve"),
    ],
)
def test_another_programs_configuration_is_refused_by_its_name(text: str, message: str) -> None:
    assert refusal(text).startswith(message)
