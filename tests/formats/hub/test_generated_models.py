"""Hybrids and mixtures from directories, against transformers and llama.cpp's converter.

`tools/make_generated_models.py` wrote down the right values.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgemerge.errors import FormatError
from edgemerge.formats.gguf.metadata import get_value
from edgemerge.formats.gguf.model import GgufModel
from edgemerge.formats.hub import layouts
from edgemerge.formats.hub import model as hub_model
from edgemerge.formats.hub.config import read_config
from edgemerge.formats.hub.model import HubModel
from edgemerge.formats.quants.filetypes import tensor_types
from edgemerge.merging.run import merge
from edgemerge.recipe.recipe import make_recipe
from edgemerge.runtime.llama import Model
from tests.support.architecture_models import convert
from tests.support.generated_models import (
    GENERATED_CASES,
    all_facts,
    draw,
    make_model,
    write_tensors,
)

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


@pytest.fixture(params=GENERATED_CASES, ids="-".join)
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
            assert hashlib.sha256(raw_u8.tobytes()).hexdigest().startswith(digest), name


@pytest.mark.parametrize("piece", [None, 100], ids=["whole", "pieces"])
def test_rows_are_the_same_in_any_pieces(
    model: HubModel, piece: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, spec in model.specs().items():
        whole_u8 = np.empty(spec.nbytes, np.uint8)
        model.read_rows(name, 0, spec.n_rows, whole_u8)
        if piece is not None:
            monkeypatch.setattr(layouts, "PIECE", piece)
            monkeypatch.setattr(hub_model, "PIECE", piece)
            monkeypatch.setattr(layouts, "SKIPPED", 0)
        for step in (1, 5, 29):
            for start in range(0, spec.n_rows, step):
                stop = min(spec.n_rows, start + step)
                out_u8 = np.empty((stop - start) * spec.row_bytes, np.uint8)
                model.read_rows(name, start, stop, out_u8)
                begin, end = start * spec.row_bytes, stop * spec.row_bytes
                assert out_u8.tobytes() == whole_u8[begin:end].tobytes(), (name, start, stop)
            model.forget(name, min(step, spec.n_rows))
        model.forget(name)
        monkeypatch.undo()


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
        found = context.decode(tokens, wanted)
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
        ("gpt_oss", {"attention_bias": False}, "attention_bias is 'False', but llama.cpp computes"),
        ("gpt_oss", {"swiglu_limit": 9.0}, "swiglu_limit is '9.0'"),
        ("gpt_oss", {"swiglu_alpha": 1.0}, "swiglu_alpha is '1.0'"),
        ("gpt_oss", {"layer_types": ["full_attention"] * 2}, "full attention in every layer 2"),
        (
            "gpt_oss",
            {"num_local_experts": 3},
            "its shape is [4, 64] but config.json makes it [3, 64]",
        ),
        (
            "gpt_oss",
            {"intermediate_size": 40},
            "rows 40 weights long, which blocks of 32 do not fill",
        ),
        (
            "gpt_oss",
            {"intermediate_size": 64},
            "down_proj_blocks': it is U8 [4, 64, 1, 16], but config.json makes it U8 [4, 64, 2, 16] in",
        ),
        ("llama4", {"moe_layers": [0, 2]}, "moe_layers is '[0, 2]', but llama.cpp computes such"),
        (
            "llama4",
            {"interleave_moe_layer_step": 1, "moe_layers": None},
            "feed_forward.down_proj.weight",
        ),
        ("llama4", {"no_rope_layers": [1, 1, 1, 1]}, "every layer 4 without rotation"),
        ("llama4", {"no_rope_layers": [], "no_rope_layer_interval": 2}, "is '[1, 0, 1, 0]'"),
        ("llama4", {"layer_types": ["full_attention"] * 4}, "full attention in every layer 4"),
        ("llama4", {"attention_chunk_size": 4096}, "attention_chunk_size is '4096'"),
        ("llama4", {"attention_chunk_size": None}, "attention_chunk_size is 'None'"),
        ("llama4", {"attn_scale": 0.2}, "attn_scale is '0.2'"),
        ("llama4", {"attn_temperature_tuning": False}, "attn_temperature_tuning is 'False'"),
        ("llama4", {"use_qk_norm": False}, "use_qk_norm is 'False', but llama.cpp computes such"),
        (
            "llama4",
            {"num_local_experts": 5},
            "its shape is [4, 24, 32] but config.json makes it [5",
        ),
        (
            "llama4",
            {"intermediate_size": 20},
            "its shape is [4, 24, 32] but config.json makes it [4, 20",
        ),
    ],
)
def test_refused_by_name(name: str, changes: dict, says: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        HubModel(make_model(name, tmp_path, **changes))
    assert says in str(caught.value)


ODD: tuple[Any, ...] = (
    0,
    -1,
    3,
    1 << 31,
    1 << 63,
    1e300,
    True,
    "x",
    [],
    [0],
    [None],
    {"a": 1},
    float("inf"),
)


@pytest.mark.parametrize("name", ["granite4_moe", "falcon_h1", "gpt_oss", "llama4"])
def test_odd_values_are_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    path = make_model(name, tmp_path) / "config.json"
    config = json.loads(path.read_text())
    for key in (*config, "rope_scaling", "mamba_d_ssm", "moe_layers", "attn_scale", "layer_types"):
        for odd in ODD:
            path.write_text(json.dumps(config | {key: odd}))
            with suppress(FormatError):
                read_config(path).metadata()


def spoil(tensors: dict, name: str) -> dict:
    """Take a tensor out, or put one in."""
    if name in tensors:
        return {key: x for key, x in tensors.items() if key != name}
    return tensors | {name: np.zeros((4, 32, 64), np.uint16)}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("down_proj_scales", "mlp.experts.down_proj_scales': is missing from the directory"),
        ("gate_up_proj_blocks", "mlp.experts.gate_up_proj_blocks': is missing from the directory"),
        ("down_proj_bias", "mlp.experts.down_proj_bias': is missing from the directory"),
        ("down_proj", "down_proj_blocks': is there both packed and plain; remove one of the two"),
    ],
)
def test_parts_of_packed_experts(name: str, says: str, tmp_path: Path) -> None:
    folder, stem = make_model("gpt_oss", tmp_path), "model.layers.1.mlp.experts."
    stored = FACTS["gpt_oss"]["stored"]
    tensors = {key: draw(key, shape, 0) for key, shape in stored.items()}
    write_tensors(folder / "model.safetensors", spoil(tensors, stem + name))
    with pytest.raises(FormatError) as caught:
        HubModel(folder)
    assert says in str(caught.value)


def test_both_parts_of_experts_are_gone(tmp_path: Path) -> None:
    folder, stem = make_model("gpt_oss", tmp_path), "model.layers.0.mlp.experts.down_proj"
    tensors = {key: draw(key, shape, 0) for key, shape in FACTS["gpt_oss"]["stored"].items()}
    for part in ("_blocks", "_scales"):
        del tensors[stem + part]
    write_tensors(folder / "model.safetensors", tensors)
    with pytest.raises(FormatError, match=r"experts\.down_proj': is missing"):
        HubModel(folder)


def test_gpt_oss_keeps_its_types_where_none_is_asked_for(tmp_path: Path) -> None:
    folder, target = make_model("gpt_oss", tmp_path / "gpt_oss"), tmp_path / "out.gguf"
    merge(make_recipe("passthrough", [(str(folder), None)]), target, threads=1)
    source, written = HubModel(folder), GgufModel(target)
    assert source.notes() == []
    packed = [name for name, spec in written.specs().items() if spec.dtype == "MXFP4"]
    assert len(packed) == 6
    for name in packed:
        spec = written.specs()[name]
        raw_u8, read_u8 = (np.empty(spec.nbytes, np.uint8) for _ in range(2))
        written.read_rows(name, 0, spec.n_rows, raw_u8)
        source.read_rows(name, 0, spec.n_rows, read_u8)
        assert raw_u8.tobytes() == read_u8.tobytes()
    for model in (source, written):
        model.close()


def test_rotation_of_gpt_oss_where_nothing_is_stated(tmp_path: Path) -> None:
    """As `GptOssConfig` of transformers has it, and as the models are published."""
    published = {
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "rope_parameters": None,
    }
    found = []
    for changes in (published, {"rope_parameters": None}):
        model = HubModel(make_model("gpt_oss", tmp_path / "gpt_oss", **changes))
        found.append(model.metadata())
        model.close()
    assert found[0] == found[1]
    assert get_value(found[0], "gpt-oss.rope.scaling.factor") == 32.0
    assert get_value(found[0], "gpt-oss.rope.freq_base") == 150000.0


def test_a_finer_cut_of_falcon_h1(tmp_path: Path) -> None:
    folder = make_model("falcon_h1", tmp_path / "falcon")
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    *_, last = tokenizer["pre_tokenizer"]["pretokenizers"]
    steps = [
        {"type": "Digits", "individual_digits": True},
        {"type": "Punctuation", "behavior": "Isolated"},
        last | {"use_regex": True},
    ]
    tokenizer["pre_tokenizer"]["pretokenizers"] = steps
    path.write_text(json.dumps(tokenizer))
    model = HubModel(folder)
    assert get_value(model.metadata(), "tokenizer.ggml.pre") == "falcon-h1"
    (note,) = model.notes()
    assert note == (
        "falcon: its tokenizer cuts text by Digits, Punctuation, ByteLevel, llama.cpp as falcon-h1: "
        "ids may differ in rare texts"
    )
    model.close()


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_llama4_beside_its_vision_tower(prefix: str, tmp_path: Path) -> None:
    """As it is published, and as transformers 5 saves it."""
    plain = HubModel(make_model("llama4", tmp_path / "llama4"))
    config, stored = FACTS["llama4"]["config"], FACTS["llama4"]["stored"]
    wrapped = {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "text_config": {k: v for k, v in config.items() if k != "architectures"},
        "vision_config": {"hidden_size": 8},
    }
    folder = tmp_path / "other" / "llama4"
    make_model("llama4", folder)
    (folder / "config.json").write_text(json.dumps(wrapped))
    tensors = {
        name.replace("model.", prefix, 1).replace("lm_head", "language_model.lm_head"): draw(
            name, shape, 0
        )
        for name, shape in stored.items()
    }
    tower = {
        "vision_model.layernorm_post.weight": np.ones(8, np.float32),
        "multi_modal_projector.linear_1.weight": np.ones((8, 8), np.float32),
    }
    write_tensors(folder / "model.safetensors", tensors | tower)
    model = HubModel(folder)
    assert model.specs() == plain.specs()
    assert model.metadata() == plain.metadata()
    (note,) = model.notes()
    assert note.endswith(
        "are left out: multi_modal_projector.linear_1.weight, " + next(iter(tower))
    )
    for source in (model, plain):
        source.close()


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
        found = context.decode(tokens, [True] * 28)
        assert np.isfinite(found).all()
