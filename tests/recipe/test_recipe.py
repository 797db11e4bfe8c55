from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from edgemerge.errors import RecipeError
from edgemerge.formats.yaml_file import MAX_RECIPE_BYTES
from edgemerge.recipe.recipe import load_recipe, make_recipe
from edgemerge.sizes import parse_size
from edgemerge.types import ModelInput, Recipe, Rule, Slice

MIB = 1 << 20

TIES = """\
merge_method: ties
base_model: base
models:
- model: a
- model: b
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working directory with three models, as far as a recipe looks at them."""
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str | bytes) -> Recipe:
    path = Path("recipe.yml")
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_recipe(path)


def refusal(text: str | bytes) -> str:
    with pytest.raises(RecipeError) as caught:
        load(text)
    assert caught.value.path == Path("recipe.yml")
    message = str(caught.value)
    assert message.startswith("recipe.yml: ")
    assert message.isprintable()
    return message.removeprefix("recipe.yml: ")


# -- recipes as they are found ---------------------------------------------------------------------


def test_ties_with_gradients_and_filters(folder: Path) -> None:
    recipe = load(
        """
        models:
          - model: a
            parameters:
              density: [1, 0.7, 0.1] # density gradient
              weight: 1.0
          - model: b
            parameters:
              density: 0.33
              weight:
                - filter: mlp
                  value: 0.5
                - value: 0
        merge_method: ties
        base_model: base
        parameters:
          normalize: true
          int8_mask: true
        dtype: float16
        """
    )
    assert recipe == Recipe(
        method="ties",
        base=folder / "base",
        slices=(
            Slice(
                (
                    ModelInput(
                        folder / "a",
                        parameters={
                            "density": (Rule((1.0, 0.7, 0.1)),),
                            "weight": (Rule(1.0),),
                        },
                    ),
                    ModelInput(
                        folder / "b",
                        parameters={
                            "density": (Rule(0.33),),
                            "weight": (Rule(0.5, "mlp"), Rule(0.0)),
                        },
                    ),
                )
            ),
        ),
        parameters={"normalize": (Rule(True),), "int8_mask": (Rule(True),)},
        dtype="float16",
    )


def test_slerp_of_slices_in_bfloat16(folder: Path) -> None:
    recipe = load(
        """
        slices:
          - sources:
              - model: a
                layer_range: [0, 32]
              - model: b
                layer_range: [0, 32]
        merge_method: slerp
        base_model: a
        parameters:
          t:
            - filter: self_attn
              value: [0, 0.5, 0.3, 0.7, 1]
            - filter: "*"
              value: 0.5
        dtype: bfloat16
        """
    )
    assert [model.layer_range for model in recipe.slices[0].inputs] == [(0, 32), (0, 32)]
    assert recipe.parameters["t"] == (Rule((0.0, 0.5, 0.3, 0.7, 1.0), "self_attn"), Rule(0.5))
    assert (recipe.dtype, recipe.out_type) == ("bfloat16", None)
    assert recipe.notes == (
        "dtype bfloat16 would lose part of the merged change; arithmetic is float32 and the "
        "output type is not changed by it (edgemerge: {type: BF16} insists)",
    )


def test_passthrough_of_slices(folder: Path) -> None:
    recipe = load(
        """
        slices:
        - sources: [{model: a, layer_range: [0, 24]}]
        - sources: [{model: b, layer_range: [8, 32]}]
          parameters: {scale: 0.5}
        merge_method: passthrough
        """
    )
    assert recipe.base is None
    assert recipe.models() == (folder / "a", folder / "b")
    assert recipe.slices[1].parameters == {"scale": (Rule(0.5),)}


def test_our_own_keys_and_mergekits_other_ones(folder: Path) -> None:
    recipe = load(
        TIES + "name: mine\nout_dtype: bfloat16\ntokenizer_source: model:a\n"
        'chat_template: "{{ messages }}"\nedgemerge: {memory: 300MiB, seed: 7}\n'
    )
    assert (recipe.out_type, recipe.memory, recipe.seed) == ("BF16", 300 * MIB, 7)
    assert recipe.tokenizer_source == str(folder / "a")
    assert recipe.chat_template == "{{ messages }}"
    assert load(TIES + "edgemerge: {type: Q4_K_M}\nout_dtype: float16\n").out_type == "Q4_K_M"
    assert load(TIES + "edgemerge:\nparameters:\n") == load(TIES)


@pytest.mark.parametrize("source", ["base", "union", "null"])
def test_tokenizer_source_by_word(folder: Path, source: str) -> None:
    wanted = None if source == "null" else source
    assert load(TIES + f"tokenizer_source: {source}\n").tokenizer_source == wanted


def test_numbers_that_yaml_takes_for_text(folder: Path) -> None:
    recipe = load(TIES + "parameters: {weight: 1e-3, density: [1e-1, .5, 1], lambda: -2E+1}\n")
    assert recipe.parameters == {
        "weight": (Rule(1e-3),),
        "density": (Rule((0.1, 0.5, 1.0)),),
        "lambda": (Rule(-20.0),),
    }


def test_models_are_looked_for_in_the_working_directory_then_beside_the_recipe(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("recipes")
    (elsewhere / "b").mkdir()
    (elsewhere / "c").mkdir()
    path = elsewhere / "recipe.yml"
    path.write_text("merge_method: linear\nmodels: [{model: b}, {model: c}]\n")
    assert load_recipe(path).models() == (folder / "b", elsewhere / "c")


# -- recipes with mistakes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TIES + "edgemerge: {qtype: Q8_0}\n", "edgemerge has the unknown key 'qtype'; did you"),
        (TIES + "dtype: float8\n", "dtype is 'float8'; choose one of float64, float32, float16"),
        (TIES + "slices: [1]\n", "needs either models, slices or modules, one of them and not e"),
        ("merge_method: ties\n", "needs either models, slices or modules, one of them and not e"),
        ("models: [{model: a}]\n", "merge_method is missing or is no text"),
        ("merge_method: ties\nmodels: []\n", "needs either models, slices or modules, one of"),
        (
            "merge_method: ties\nmodels: [a]\n",
            "models[0] must be a table of keys and values; write model: a",
        ),
        ("merge_method: ties\nmodels: [{model: 7}]\n", "models[0].model must be the path of a m"),
        (
            "merge_method: ties\nmodels: [{model: org/name}]\n",
            "models[0].model: no file or folder 'org/name'",
        ),
        (
            "merge_method: ties\nmodels: [{model: a+lora}]\n",
            "models[0].model: no file or folder 'lora'; download the LoRA adapter and give its path",
        ),
        ('merge_method: ties\nmodels: [{model: "\\ud800"}]\n', "models[0].model: the name '\\ud80"),
        (f"merge_method: ties\nmodels: [{{model: {'x' * 300}}}]\n", "models[0].model: no file or"),
        ("merge_method: ties\nmodels: [{model: ~nobody-here/x}]\n", "models[0].model: no file or"),
        (TIES + "tokenizer_source: [a]\n", "tokenizer_source must be the path of a model"),
        (TIES + "tokenizer_source: c\n", "tokenizer_source: no file or folder 'c'; download"),
        (TIES + "chat_template: chatmk\n", "chat_template 'chatmk' is no Jinja text; give the te"),
        (TIES + 'chat_template: "{{ \\ud800 }}"\n', "chat_template '{{ \\ud800 }}' is no Jinja te"),
        (TIES + "edgemerge: {seed: -1}\n", "edgemerge.seed must be a whole number from 0 to 2^64"),
        (TIES + f"edgemerge: {{seed: {1 << 64}}}\n", "edgemerge.seed must be a whole number from"),
        (TIES + "edgemerge: {memory: much}\n", "edgemerge.memory: 'much' is no size; write it li"),
        (TIES + "edgemerge: {memory: }\n", "edgemerge.memory: None is no size; write it like 512"),
        (TIES + "parameters: {weight: }\n", "parameters.weight is None; it must be a finite num"),
        (TIES + "parameters: {weight: .nan}\n", "parameters.weight is nan; it must be a finite n"),
        (TIES + "parameters: {weight: .inf}\n", "parameters.weight is inf; it must be a finite n"),
        (TIES + f"parameters: {{weight: {'9' * 400}}}\n", "parameters.weight is 99999999999999"),
        (TIES + "parameters: {weight: [1, a]}\n", "parameters.weight must be a number, or a list"),
        (TIES + "parameters: {weight: [1, true]}\n", "parameters.weight must be a number, or a l"),
        (TIES + "parameters: {weight: [{filter: a}]}\n", "parameters.weight needs entries of the"),
        (TIES + "parameters: {weight: [{value: 1}, 2]}\n", "parameters.weight must be a table of"),
        (TIES + "parameters: [weight]\n", "parameters must be a table of keys and values"),
    ],
)
def test_a_mistake_is_named(folder: Path, text: str, message: str) -> None:
    found = refusal(text)
    assert found.startswith(message)
    assert len(found) < 450


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("[{model: a}]", "slices[0].sources[0].layer_range must be a list that is not empty"),
        ("[{model: a, layer_range: [2, 2]}]", "slices[0].sources[0].layer_range must be [first, "),
        ("[{model: a, layer_range: [0, true]}]", "slices[0].sources[0].layer_range must be [fir"),
        (
            "[{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 3]}]",
            "the sources of slices[0] have layer ranges of different lengths",
        ),
    ],
)
def test_a_mistake_in_a_slice_is_named(folder: Path, sources: str, message: str) -> None:
    assert refusal(f"merge_method: linear\nslices: [{{sources: {sources}}}]\n").startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a recipe: it needs keys such as merge_method and models"),
        ("- a\n- b\n", "is not a recipe: it needs keys such as merge_method and models"),
        ("{a: [", "is not valid YAML (line 1, column 6: expected the node content, but found '<s"),
        (TIES + "1: 2\n", "is not valid YAML (line 6, column 1: the key 1 is not text)"),
        (TIES + "? [a]\n: 2\n", "is not valid YAML (line 6, column 3: a key is not text)"),
        (TIES + "---\n- a\n", "is not a recipe: it needs keys such as merge_method and models"),
        ("a: !!python/name:os.system x", "is not valid YAML (line 1, column 4: could not determi"),
        (
            "".join(
                f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 10)}]\n" for i in range(9)
            ),
            "is not valid YAML (line 5, column 5: aliases make it too large for a recipe)",
        ),
        (
            "a: &a [*a]\n",
            "is not valid YAML (line 1, column 8: an alias stands inside what it repeats)",
        ),
        ("[" * 20_000, "is not valid YAML (line 1, column 65: nested too deeply)"),
        ("- " * 200, "is not valid YAML (line 1, column 129: nested too deeply)"),
        (f"a: 0x{'f' * 5000}", "is not valid YAML (line 1, column 4: this number has more digits"),
        ("a: !!bool x", "is not valid YAML (line 1, column 4: this is no bool)"),
        ("- a: !!timestamp x", "is not valid YAML (line 1, column 6: this is no timestamp)"),
        ("a: !!int ''", "is not valid YAML (line 1, column 4: this is no int)"),
        ("a: 2001-99-99", "is not valid YAML (month must be in 1..12)"),
        (b"a: \xff\xfe", "is not valid YAML (unacceptable character #x00ff: invalid start byte"),
        ("#" * (MAX_RECIPE_BYTES + 1), "is larger than 256 KiB, so it is no recipe"),
    ],
)
def test_what_is_no_recipe_at_all(folder: Path, text: str | bytes, message: str) -> None:
    assert refusal(text).startswith(message)


def test_many_keys_do_not_take_quadratic_time(folder: Path) -> None:
    text = "{" + ",".join(f"k{i}: 1" for i in range(20_000)) + "}"
    start = time.process_time()
    assert refusal(text).startswith("merge_method is missing")
    assert time.process_time() - start < 10


def test_a_file_that_cannot_be_read(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"^no\.yml: cannot read the recipe \(No such file"):
        load_recipe("no.yml")
    with pytest.raises(RecipeError, match=r"^base: cannot read the recipe \(Is a directory\)"):
        load_recipe("base")


# -- flags -----------------------------------------------------------------------------------------


def test_flags_make_a_recipe(folder: Path) -> None:
    recipe = make_recipe(
        "ties",
        [("a", 0.7), ("b", None)],
        base="base",
        parameters={"density": 0.5, "normalize": False, "lambda": [0, 1]},
        out_type="Q8_0",
        memory=MIB,
        seed=3,
    )
    assert recipe == Recipe(
        method="ties",
        base=folder / "base",
        slices=(
            Slice(
                (
                    ModelInput(folder / "a", parameters={"weight": (Rule(0.7),)}),
                    ModelInput(folder / "b"),
                )
            ),
        ),
        parameters={
            "density": (Rule(0.5),),
            "normalize": (Rule(False),),
            "lambda": (Rule((0.0, 1.0)),),
        },
        defaults={"weight": (Rule(1.0),)},
        out_type="Q8_0",
        memory=MIB,
        seed=3,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": [("a", float("nan"))]}, "the weight of a is nan; it must be a finite number"),
        ({"models": [("c", None)]}, "model: no file or folder 'c'; download the model and give"),
        ({"models": [("", None)]}, "model must be the path of a model"),
        ({"base": "~/c"}, "--base: no file or folder '~/c'; write the whole path, such as /"),
        ({"base": "c"}, "--base: no file or folder 'c'; download the model and give its path"),
        ({"parameters": {"densty": 1}}, "-P has the unknown parameter 'densty'; did you mean 'd"),
        ({"parameters": {"density": None}}, "-P density is None; it must be a finite number, tr"),
        ({"seed": 1 << 64}, "seed must be a whole number from 0 to 2^64 - 1"),
    ],
)
def test_a_mistake_in_the_flags_is_named(
    folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe("ties", **{"models": [("a", None)], **options})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("512MiB", 512 * MIB),
        ("512mib", 512 * MIB),
        (" 1.5G ", 1536 * MIB),
        ("800M", 800 * MIB),
        ("2 GB", 2 * 10**9),
        ("64KiB", 64 << 10),
        ("1T", 1 << 40),
        ("4096", 4096),
        ("4096B", 4096),
        (4096, 4096),
    ],
)
def test_sizes(text: str | int, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


def test_a_small_number_without_a_unit_was_meant_to_have_one() -> None:
    with pytest.raises(RecipeError, match=r"^400 is 400 bytes; did you mean 400MiB\?$"):
        parse_size("400")


@pytest.mark.parametrize(
    "text", ["", "0", "-5", "much", "5X", "1.5.2M", "0.1", "1e9", "nan", "inf", "9" * 400, "٣M"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(RecipeError, match=r"is no size; write it like 512MiB, 1\.5G or 800M"):
        parse_size(text)
