"""Directories of Gemma 3n and 4: as they are published, and what llama.cpp does not compute."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgemerge.errors import FormatError
from edgemerge.formats.hub.model import HubModel
from edgemerge.planning.compatibility import is_scale
from tests.formats.hub.test_delta_nets import everything, save
from tests.support.fake_source import FakeSource, tensor
from tests.support.generated_models import WEIGHTS, make_model, write_tensors
from tests.support.safetensors_files import read_safetensors

SLIDING, FULL = "sliding_attention", "full_attention"
PUBLISHED: dict[str, Any] = {"per_layer_config": None, "global_head_dim": 16}
KEYS = {**PUBLISHED, "num_global_key_value_heads": 1}


@pytest.mark.parametrize(
    ("name", "changes"),
    [("gemma4", PUBLISHED), ("gemma4", {**KEYS, "rope_parameters": None}), ("gemma4_keys", KEYS)],
)
def test_heads_of_full_attention_as_published_models_state_them(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    plain = everything(make_model(name, tmp_path / "plain"))
    assert everything(make_model(name, tmp_path / "published", **changes))[:2] == plain[:2]


def test_the_text_model_beside_towers(tmp_path: Path) -> None:
    """Layers that share keys and values have some of their own there, which nothing uses."""
    plain = everything(make_model("gemma4", tmp_path / "plain"))
    folder = make_model("gemma4", tmp_path / "whole")
    config = json.loads((folder / "config.json").read_text())
    classes = [config.pop("architectures")[0].replace("ForCausalLM", "ForConditionalGeneration")]
    whole = {"architectures": classes, "model_type": "gemma4", "text_config": config}
    (folder / "config.json").write_text(json.dumps(whole | {"vision_config": {"hidden_size": 8}}))
    tensors = read_safetensors(folder / WEIGHTS)
    renamed = {key.replace("model.", "model.language_model.", 1): x for key, x in tensors.items()}
    extra = {
        f"model.{name}": np.ones((8, 8), np.float32)
        for name in (
            "audio_tower.output_proj.weight",
            "embed_vision.embedding_projection.weight",
            "language_model.layers.5.self_attn.k_proj.weight",
            "vision_tower.std_bias",
        )
    }
    save(folder, renamed | extra)
    found = everything(folder)
    assert found[:2] == plain[:2]
    assert found[2] == [
        "whole: tensors that the language model does not use are left out: "
        f"{', '.join([*extra][:3])} and 1 more"
    ]


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("gemma4", {"use_bidirectional_attention": "all"}, "with causal attention of text"),
        (
            "gemma4",
            {"vocab_size_per_layer_input": 300},
            "computes such models with vocab_size, 390",
        ),
        ("gemma4", {"num_kv_shared_layers": 3}, "a window and then full attention in the last two"),
        ("gemma4", {"num_kv_shared_layers": 6}, "two layers at least that do not share"),
        ("gemma4", PUBLISHED | {"layer_types": [SLIDING] * 6}, "full attention in the last layer"),
        ("gemma4", {"per_layer_config": {"1": {"head_dim": 16}}}, "full attention alike"),
        ("gemma4", {"per_layer_config": {str(i): {"head_dim": 16} for i in range(6)}}, "alike"),
        ("gemma4", {"per_layer_config": [8]}, "must be an object beside a list of layer_types"),
        (
            "gemma4",
            {"per_layer_config": {i: {"hidden_size": 1} for i in ("1", "3", "5")}},
            "per_layer_config.hidden_size",
        ),
        ("gemma4_keys", KEYS | {"num_global_key_value_heads": 3}, "a divisor of the 4 heads"),
        (
            "gemma4_keys",
            KEYS | {"attention_k_eq_v": False},
            "k_proj.weight': its shape is [16, 32]",
        ),
        ("gemma4", {"rope_parameters": {FULL: {"rope_type": "default"}}}, "of type 'default'"),
        (
            "gemma4",
            {"rope_parameters": {FULL: {"rope_type": "proportional", "factor": 2.0}}},
            "factor is '2.0'",
        ),
        ("gemma4", {"intermediate_size": (1 << 31) - 1}, "must be an integer from 1 to 1073741823"),
        ("gemma3n", {"num_kv_shared_layers": 3}, "computes such models with 2, 20 layers less"),
        ("gemma3n", {"altup_num_inputs": 3}, "computes such models with 4"),
        ("gemma3n", {"altup_active_idx": 1}, "computes such models with 0"),
        ("gemma3n", {"final_logit_softcapping": 50.0}, "computes such models with 30.0"),
        ("gemma3n", {"laurel_rank": 32}, "computes such models with 64"),
        ("gemma3n", {"intermediate_size": [256] * 21 + [128]}, "with one width in all layers"),
        ("gemma3n", {"activation_sparsity_pattern": [0.0] * 22}, "0.95 in the first 10 layers"),
        ("gemma3n", {"vocab_size_per_layer_input": 385}, "vocab_size, 384, at most"),
        ("gemma3n", {"layer_types": [FULL] * 22}, "a window and then full attention"),
        ("gemma3n", {"rope_parameters": {FULL: {"rope_type": "yarn"}}}, "of type 'yarn'"),
        ("gemma4_moe", {"num_experts": 5}, "experts.down_proj': its shape is [4, 32, 24]"),
        ("gemma4_moe", {"enable_moe_block": False}, "has no such tensor"),
        ("gemma4", {"hidden_size_per_layer_input": None}, "has no such tensor"),
    ],
)
def test_refused_by_name(name: str, changes: dict, says: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        HubModel(make_model(name, tmp_path, **changes))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("gemma4_moe", "model.layers.4.layer_scalar"),
        ("gemma4_moe", "model.layers.0.router.scale"),
        ("gemma4_moe", "model.layers.1.experts.down_proj"),
        ("gemma3n", "model.altup_projections.0.weight"),
        ("gemma3n", "model.embed_tokens.weight"),
        ("gemma3n", "model.layers.19.self_attn.k_proj.weight"),
    ],
)
def test_a_missing_tensor_is_named(name: str, missing: str, tmp_path: Path) -> None:
    folder = make_model(name, tmp_path)
    tensors = read_safetensors(folder / WEIGHTS)
    del tensors[missing]
    save(folder, tensors)
    with pytest.raises(FormatError) as caught:
        HubModel(folder)
    assert f"tensor '{missing}': is missing" in str(caught.value)


def test_gemma4_goes_by_its_merges(tmp_path: Path) -> None:
    folder = make_model("gemma4", tmp_path)
    plain = everything(folder)
    (folder / "tokenizer.model").write_bytes(b"not read")
    assert everything(folder) == plain
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match=r"has no tokenizer\.json; get it"):
        everything(folder)


def test_defaults_of_gemma3n(tmp_path: Path) -> None:
    plain = everything(make_model("gemma3n", tmp_path / "plain"))
    unsaid = ("activation_sparsity_pattern", "layer_types", "rope_parameters", "laurel_rank")
    changes: dict[str, Any] = {"intermediate_size": 256, **dict.fromkeys(unsaid)}
    older = make_model("gemma3n", tmp_path / "older", **changes)
    assert everything(older)[:2] == plain[:2]


def test_gemma3n_with_all_keys_as_it_is_published(tmp_path: Path) -> None:
    """Layers that share keys and values have unused ones, for which else zeros are written."""
    (note,) = (plain := everything(make_model("gemma3n", tmp_path / "plain")))[2]
    assert note.startswith("plain: zeros are written for tensors that llama.cpp wants but does not")
    folder = make_model("gemma3n", tmp_path / "whole")
    tensors = read_safetensors(folder / WEIGHTS)
    parts = {"k_proj": "attn_k", "v_proj": "attn_v", "k_norm": "attn_k_norm"}
    for i in (20, 21):
        for part in parts:
            like = tensors[f"model.layers.0.self_attn.{part}.weight"]
            tensors[f"model.layers.{i}.self_attn.{part}.weight"] = like
    save(folder, tensors)
    found = everything(folder)
    own = {f"blk.{i}.{part}.weight" for i in (20, 21) for part in parts.values()}
    assert found[0] == {
        name: plain[0][name.replace(".20.", ".0.").replace(".21.", ".0.")] if name in own else x
        for name, x in plain[0].items()
    }
    assert all(not any(plain[0][name]) for name in own)
    assert found[2] == []


def test_rows_that_the_embeddings_of_layers_lack_are_zeros(tmp_path: Path) -> None:
    model = HubModel(make_model("gemma3n", tmp_path))
    spec = model.specs()["per_layer_token_embd.weight"]
    out_u8 = np.ones(3 * spec.row_bytes, np.uint8)
    model.read_rows(spec.name, 381, 384, out_u8)
    model.close()
    assert out_u8[: spec.row_bytes].any()
    assert not out_u8[spec.row_bytes :].any()


def test_matrices_of_a_stack_have_one_type(tmp_path: Path) -> None:
    folder = make_model("gemma3n", tmp_path)
    tensors = {
        name: (x.view("<u4") >> 16).astype("<u2")
        for name, x in read_safetensors(folder / WEIGHTS).items()
    }
    name = "model.altup_projections.1.weight"
    write_tensors(folder / WEIGHTS, tensors | {name: np.zeros((32, 32), np.float32)})
    with pytest.raises(FormatError) as caught:
        HubModel(folder)
    assert f"{name}': its type is F32, not that of others" in str(caught.value)


@pytest.mark.parametrize(("dtype", "is_factor"), [("NVFP4", True), ("Q4_K", False)])
def test_scales_of_experts_are_weights_but_beside_nvfp4(dtype: str, is_factor: bool) -> None:
    experts = tensor("blk.0.ffn_down_exps.weight", (4, 256, 256), dtype)
    gemma = FakeSource("x.gguf", architecture="gemma4", extra=[experts])
    assert is_scale("blk.0.ffn_down_exps.scale", gemma) == is_factor
    assert not is_scale("blk.0.ffn_gate_inp.scale", gemma)
    assert is_scale("blk.0.ffn_up_exps.scale", gemma)
    assert is_scale("blk.0.ffn_down_exps.scale", FakeSource("x.gguf", extra=[experts]))
