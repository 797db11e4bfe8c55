"""Hybrids and mixtures from directories, against transformers and llama.cpp's converter.

`tools/make_generated_models.py` wrote down the right values.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgemerge.errors import FormatError
from edgemerge.formats.hub.model import HubModel
from edgemerge.formats.quants.filetypes import tensor_types
from edgemerge.merging.run import merge
from edgemerge.recipe.recipe import make_recipe
from edgemerge.runtime.llama import Model
from tests.support.architecture_models import convert
from tests.support.generated_models import all_facts, make_model

FACTS = all_facts()
# Which the converter has otherwise: it goes by the layers, not by what config.json says of the rotation.
ROTATION = ("rope.scaling.finetuned", "context_length")
OURS = {
    ("granite4_nope", "plain"): [f"granite.{ROTATION[0]}"],
    ("granite4_hybrid", "rope"): [f"granitehybrid.{key}" for key in ROTATION],
    ("falcon_h1_norm", "plain"): ["general.size_label"],
    # Added tokens that are not special are found before all others, as in transformers.
    **{(f"gemma4{end}", "plain"): ["tokenizer.ggml.token_type"] for end in ("", "_keys", "_moe")},
}
# A tied head that has other factors than the embedding is stored, as llama.cpp would take the embedding's.
EXTRA = {("falcon_h1_norm", "plain"): ["output.weight"]}
# llama.cpp wants these in all layers, transformers leaves them out where others are used instead.
UNSHARED = [f"blk.{i}.attn_{name}.weight" for i in (20, 21) for name in ("k", "v", "k_norm")]
EXTRA[("gemma3n", "plain")] = UNSHARED
CASES = [(name, variant) for name, facts in FACTS.items() for variant in facts["variants"]]


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture
def expected(case: tuple[str, str]) -> dict:
    name, variant = case
    return FACTS[name]["variants"][variant]


@pytest.fixture
def model(case: tuple[str, str], expected: dict, tmp_path: Path) -> Iterator[HubModel]:
    model = HubModel(make_model(case[0], tmp_path / case[0], **expected["config"]))
    yield model
    model.close()


def test_metadata_is_the_converters(case: tuple[str, str], model: HubModel, expected: dict) -> None:
    found, ours = model.metadata(), OURS.get(case, [])
    assert list(found) == list(expected["metadata"])
    for key, value in expected["metadata"].items():
        raw = found[key]
        shown = f"sha256:{hashlib.sha256(raw).hexdigest()}" if len(raw) > 80 else raw.hex()
        assert (shown == value) == (key not in ours), key


def test_tensors_are_the_converters(case: tuple[str, str], model: HubModel, expected: dict) -> None:
    assert list(model.specs()) == [*expected["tensors"], *EXTRA.get(case, [])]
    types = tensor_types("F16", model.specs(), model.metadata(), model.architecture)
    for name, (shape, digest, dtype) in expected["tensors"].items():
        spec = model.specs()[name]
        assert list(spec.shape) == shape, name
        raw_u8 = np.empty(spec.nbytes, np.uint8)
        model.read_rows(name, 0, spec.n_rows, raw_u8)
        if spec.dtype == "MXFP4":
            assert dtype == "MXFP4"
        else:
            assert types[name] == dtype, name
            if spec.dtype == "BF16":
                raw_u8 = (raw_u8.view("<u2").astype("<u4") << 16).view(np.uint8)
        if not name.endswith("ssm_a"):  # torch's exponential may differ in the last place
            assert hashlib.sha256(raw_u8.tobytes()).hexdigest()[:10] == digest, name


def test_rows_are_the_same_in_any_pieces(model: HubModel) -> None:
    for name, spec in model.specs().items():
        whole_u8 = np.empty(spec.nbytes, np.uint8)
        model.read_rows(name, 0, spec.n_rows, whole_u8)
        for step in (1, 5, 29):
            for start in range(0, spec.n_rows, step):
                stop = min(spec.n_rows, start + step)
                out_u8 = np.empty((stop - start) * spec.row_bytes, np.uint8)
                model.read_rows(name, start, stop, out_u8)
                begin, end = start * spec.row_bytes, stop * spec.row_bytes
                assert out_u8.tobytes() == whole_u8[begin:end].tobytes(), (name, start, stop)
            model.forget(name, min(step, spec.n_rows))
        model.forget(name)


def test_logits_are_those_of_transformers(
    case: tuple[str, str], model: HubModel, expected: dict, tmp_path: Path
) -> None:
    tokens = FACTS[case[0]]["tokens"]
    target = convert(model.path, tmp_path / "model.gguf")
    shown = {int(i): values for i, values in expected["logits"].items()}
    with (
        Model(target, n_threads=1) as loaded,
        loaded.context(128, n_batch=64, n_outputs=len(shown), exact=True) as context,
    ):
        wanted = [i in shown for i in range(len(tokens))]
        found = context.decode(tokens, range(len(tokens)), [(0,)] * len(tokens), wanted)
        for logits, values in zip(found, shown.values(), strict=True):
            np.testing.assert_allclose(logits[: len(values)], values, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", FACTS)
def test_tokens_are_those_of_the_tokenizer(name: str, tmp_path: Path) -> None:
    folder = make_model(name, tmp_path / name)
    with Model(convert(folder, tmp_path / "model.gguf"), n_threads=1) as model:
        assert model.tokenize(FACTS[name]["text"]) == FACTS[name]["text_ids"]


def test_infinity_as_transformers_4_wrote_it(tmp_path: Path) -> None:
    folder = make_model("granite4_hybrid", tmp_path, time_step_limit=[0.0, float("inf")])
    assert "[0.0, Infinity]" in (folder / "config.json").read_text()
    HubModel(folder).close()


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("falcon_h1", {"projectors_bias": True}, "projectors_bias is 'True'"),
        ("falcon_h1", {"attention_bias": True}, "attention_bias is 'True'"),
        ("falcon_h1", {"mamba_rms_norm": True}, "mamba_norm_before_gate is 'True'"),
        ("falcon_h1", {"mlp_multipliers": [1.0]}, "it must be a list of 2 numbers"),
        ("falcon_h1", {"ssm_multipliers": [1, 1, 1, 1, 0]}, "ssm_multipliers is '0'"),
        (
            "falcon_h1",
            {"mamba_d_ssm": None},
            "mamba_n_heads is '6', it must be a divisor of the 64",
        ),
        ("falcon_h1", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "of type 'yarn'"),
    ],
)
def test_refused_by_name(name: str, changes: dict, says: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        HubModel(make_model(name, tmp_path, **changes))
    assert says in str(caught.value)


@pytest.mark.parametrize("method", ["linear", "ties"])
@pytest.mark.parametrize("name", FACTS)
def test_experts_merge_quantise_and_run(name: str, method: str, tmp_path: Path) -> None:
    folders = [make_model(name, tmp_path / str(seed), seed=seed) for seed in range(3)]
    base = str(folders[0]) if method == "ties" else None
    experts = [(str(folder), 0.5) for folder in folders[1:]]
    recipe = make_recipe(method, experts, base=base, out_type="Q4_K_M")
    target = tmp_path / "merged.gguf"
    merge(recipe, target, threads=2, memory=200 << 20)
    with (
        Model(target, n_threads=1) as loaded,
        loaded.context(64, n_batch=32, n_outputs=28) as context,
    ):
        tokens = FACTS[name]["tokens"]
        found = context.decode(tokens, range(len(tokens)), [(0,)] * len(tokens), [True] * 28)
        assert np.isfinite(found).all()
