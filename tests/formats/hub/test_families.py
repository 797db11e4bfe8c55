"""config.json of every family: the keys of published models, and what is refused by name."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgemerge.errors import FormatError
from edgemerge.formats.gguf.metadata import get_value
from edgemerge.formats.hub.config import read_config
from edgemerge.formats.hub.model import HubModel
from edgemerge.formats.hub.rope import rope_tensors
from tests.support.architecture_models import ARCHITECTURES, copy_model
from tests.support.safetensors_files import read_safetensors, write_safetensors

CONFIGS = json.loads((ARCHITECTURES / "configs.json").read_text())


@pytest.mark.parametrize("name", CONFIGS)
def test_keys_of_published_models(name: str, tmp_path: Path) -> None:
    entry = CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps(entry["config"]))
    config = read_config(tmp_path / "config.json")
    found = config.metadata()
    assert list(found) == list(entry["metadata"])
    for key, expected in entry["metadata"].items():
        value = get_value(found, key)
        assert value == (np.float32(expected) if isinstance(value, float) else expected), key
    tensors = rope_tensors(config.rope)
    assert list(tensors) == list(entry["tensors"])
    for key, expected in entry["tensors"].items():
        np.testing.assert_allclose(tensors[key], np.float32(expected), rtol=1e-6)


def refusal(model: Path) -> str:
    with pytest.raises(FormatError) as caught:
        HubModel(model)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("gemma2", {"query_pre_attn_scalar": 7}, "query_pre_attn_scalar is '7.0'"),
        ("gemma2", {"num_hidden_layers": 46}, "query_pre_attn_scalar is '16.0'"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "layer_types"),
        ("gemma2", {"rope_parameters": {"rope_theta": 5e5}}, "rope_theta is '500000.0'"),
        ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping is '0'"),
        ("gemma2", {"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        ("gemma3", {"layer_types": ["sliding_attention"] * 7}, "full attention in every layer 6"),
        ("gemma3", {"layer_types": None, "sliding_window_pattern": 4}, "sliding_window_pattern"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is '50.0'"),
        ("gemma3", {"rope_parameters": {"full_attention": 3}}, "rope_parameters.full_attention"),
        (
            "gemma3",
            {
                "rope_parameters": {
                    "full_attention": {},
                    "sliding_attention": {"rope_type": "linear", "factor": 2.0},
                }
            },
            "rope_parameters.sliding_attention.rope_type is 'linear'",
        ),
        ("gemma3", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "type 'yarn'"),
        ("qwen2", {"head_dim": 16}, "head_dim is '16'"),
        ("qwen2", {"rope_scaling": {"rope_type": "llama3"}}, "type 'llama3'"),
        ("qwen3", {"attention_bias": True}, "attention_bias is 'True'"),
        ("mixtral", {"mlp_bias": True}, "mlp_bias is 'True'"),
        (
            "qwen3",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": False}},
            "truncate is 'False'",
        ),
        (
            "qwen3",
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": "x"}},
            "mscale is 'x'",
        ),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is 'False'"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers is '[0]'"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is '2'"),
        ("qwen3_moe", {"num_local_experts": 3}, "mlp.experts.3.down_proj.weight"),
        ("qwen3_moe", {"num_local_experts": 5}, "mlp.gate.weight': its shape is [4, 32]"),
        ("qwen3_moe", {"moe_intermediate_size": 32}, "makes it [32, 32]"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts is '0'"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "no_rope_layers is '[1, 1, 1, 1]'"),
        (
            "smollm3",
            {"no_rope_layers": None, "no_rope_layer_interval": 2},
            "no_rope_layers is '[1, 0, 1, 0]'",
        ),
        ("granite", {"logits_scaling": "x"}, "logits_scaling is 'x'"),
        ("granite", {"rope_parameters": {"rope_type": "llama3"}}, "type 'llama3'"),
        ("phi3", {"rope_parameters": {"partial_rotary_factor": 2}}, "partial_rotary_factor is '2'"),
        ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.4}}, "an even part of 8"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope"}}, "long_factor is 'None'"),
        (
            "phi3",
            {"rope_parameters": {"type": "su", "long_factor": [1] * 4, "short_factor": [1] * 3}},
            "short_factor is '[1, 1, 1]', it must be a list of 4 numbers",
        ),
        (
            "phi3",
            {"rope_parameters": {"type": "su", "long_factor": [1, 1, 0, 1]}},
            "long_factor is '0', it must be a positive number",
        ),
        (
            "phi3",
            {"rope_parameters": {"type": "su", "factor": "2"}},
            "factor is '2', it must be a positive number",
        ),
        ("phi3", {"original_max_position_embeddings": 1}, "an integer above 1"),
        (
            "qwen2",
            {"rope_parameters": {"rope_theta": 1}},
            "rope_theta is '1.0', it must be above 1",
        ),
        ("phi3", {"head_dim": 16}, "head_dim is '16'"),
        # Fault: tracebacks
        (
            "lfm2",
            {"block_ffn_dim_multiplier": 1e30},
            "block_ffn_dim_multiplier of 1e+30 makes a size of 2e+31",
        ),
        (
            "lfm2",
            {"block_multiple_of": 1_200_000_000, "block_ff_dim": (1 << 31) - 1},
            "block_multiple_of of 1200000000 makes a size of 2.4e+09",
        ),
        (
            "qwen3",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 1e38,
                    "mscale": 1e38,
                    "mscale_all_dim": 1,
                }
            },
            "mscale is '1e+38', it must be a positive number up to 1e+06",
        ),
        (
            "qwen3",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 1e-320}},
            "beta_fast is '1e-320', it must be a positive number",
        ),
        ("olmo3", {"layer_types": ["full_attention"] * 3}, "it must be a list of 4 of sliding_att"),
        ("olmo3", {"layer_types": ["conv"] * 4}, "it must be a list of 4 of sliding_attention"),
        ("granite4", {"layer_types": ["mamba", "conv"]}, "a list of mamba, linear_attention, att"),
        (
            "granite4",
            {"layer_types": ["mamba"]},
            "it must be a list of 2; correct",
        ),
        (
            "granite4",
            {"layer_types": None},
            "self_attn.k_proj.weight': llama.cpp's granitehybrid with",
        ),
        (
            "granite4",
            {"layer_types": None, "mamba_expand": 3},
            "mamba_expand is '3', but llama.cpp",
        ),
        (
            "granite4",
            {"layer_types": None, "mamba_n_heads": 5},
            "mamba_n_heads is '5', it must be a div",
        ),
        ("granite4", {"layer_types": None, "mamba_d_head": 4}, "it must be 32 channels / 4 heads"),
        (
            "granite4",
            {"layer_types": None, "mamba_proj_bias": True},
            "computes such models with none",
        ),
        ("granite4", {"layer_types": None, "mamba_conv_bias": False}, "mamba_conv_bias is 'False'"),
        ("granite4", {"layer_types": None, "time_step_limit": [0.0, 0.1]}, "models with no limit"),
        ("granite4", {"num_local_experts": 4}, "num_experts_per_tok is '0'"),
        (
            "granite4",
            {"num_local_experts": 4, "num_experts_per_tok": 2},
            "block_sparse_moe.router.layer.weight': is missing",
        ),
        (
            "granite4",
            {"num_local_experts": 4, "position_embedding_type": "nope"},
            "computes such models with 'rope'",
        ),
        ("granite4", {"shared_intermediate_size": 16}, "that of intermediate_size"),
        (
            "granite4",
            {"intermediate_size": 16, "shared_intermediate_size": 16},
            "shared_mlp.input_linear.weight': its shape is [24, 16] but config.json makes it [16, 16]",
        ),
        (
            "ministral3",
            {"rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": 0.1}},
            "rope_type is 'default', but llama.cpp computes such models with 'yarn'",
        ),
    ],
)
def test_refused_by_name(name: str, changes: dict, says: str, tmp_path: Path) -> None:
    assert says in refusal(copy_model(name, changes, tmp_path))


def read(model: HubModel, name: str, start: int, stop: int) -> bytes:
    out_u8 = np.empty((stop - start) * model.specs()[name].row_bytes, np.uint8)
    model.read_rows(name, start, stop, out_u8)
    return out_u8.tobytes()


def test_rows_of_experts_in_any_shards(tmp_path: Path) -> None:
    """Every range of rows of a stack whose experts lie in three files, in no order."""
    folder = copy_model("mixtral", {}, tmp_path)
    tensors = read_safetensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {key: f"model-{i * 7 % 3 + 1:05}.safetensors" for i, key in enumerate(tensors)}
    for shard in set(weight_map.values()):
        own = {key: tensors[key] for key in tensors if weight_map[key] == shard}
        write_safetensors(folder / shard, own)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    model = HubModel(folder)
    name = "blk.1.ffn_down_exps.weight"
    stem = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    stacked = np.concatenate([tensors[stem.format(i)] for i in range(4)])
    assert model.specs()[name].shape == (4, 32, 32)
    for start in range(0, 129, 3):
        for stop in range(start, 129, 5):
            assert read(model, name, start, stop) == stacked[start:stop].tobytes()
    model.forget(name)
    model.close()


def test_a_missing_expert(tmp_path: Path) -> None:
    folder = copy_model("qwen3_moe", {}, tmp_path)
    tensors = read_safetensors(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    write_safetensors(folder / "model.safetensors", tensors)
    assert "tensor 'model.layers.1.mlp.experts.2.up_proj.weight': is missing" in refusal(folder)


def test_experts_of_two_types(tmp_path: Path) -> None:
    folder = copy_model("mixtral", {}, tmp_path)
    path = folder / "model.safetensors"
    tensors: dict = dict(read_safetensors(path))
    key = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
    tensors[key] = tensors[key].astype(np.float16)
    os.unlink(path)
    save_file(tensors, path)
    assert "experts.2.w1.weight': its type is F16, that of the layer's first expert F32" in refusal(
        folder
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_norms_of_gemma(dtype: type[np.floating], tmp_path: Path) -> None:
    folder = copy_model("gemma2", {}, tmp_path)
    path = folder / "model.safetensors"
    tensors = {key: x.astype(dtype) for key, x in read_safetensors(path).items()}
    os.unlink(path)
    save_file(tensors, path)
    model = HubModel(folder)
    spec = model.specs()["blk.0.post_ffw_norm.weight"]
    assert (spec.dtype, spec.nbytes) == ("F32", 128)
    stored = load_file(path)["model.layers.0.post_feedforward_layernorm.weight"]
    expected = stored.astype(np.float32) + np.float32(1)
    assert read(model, spec.name, 0, 1) == expected.tobytes()
    model.close()


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
@pytest.mark.parametrize(
    ("name", "outer", "architecture"),
    [
        ("gemma3", "gemma3", "Gemma3ForConditionalGeneration"),
        ("ministral3", "mistral3", "Mistral3ForConditionalGeneration"),
    ],
)
def test_text_models_beside_a_vision_tower(
    name: str, outer: str, architecture: str, prefix: str, tmp_path: Path
) -> None:
    """The text model of the multimodal files is that of the text-only ones."""
    plain = HubModel(ARCHITECTURES / name)
    folder = copy_model(name, {}, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    wrapped = {
        "architectures": [architecture],
        "model_type": outer,
        "text_config": {k: v for k, v in config.items() if k != "architectures"},
        "vision_config": {"hidden_size": 8},
    }
    (folder / "config.json").write_text(json.dumps(wrapped))
    path = folder / "model.safetensors"
    tensors = {
        key.replace("model.", prefix, 1).replace("lm_head", "language_model.lm_head"): x
        for key, x in read_safetensors(path).items()
    }
    tensors["vision_tower.vision_model.post_layernorm.weight"] = np.ones(8, np.float32)
    tensors["multi_modal_projector.mm_input_projection_weight"] = np.ones((8, 8), np.float32)
    write_safetensors(path, tensors)
    model = HubModel(folder)
    assert set(model.specs()) == set(plain.specs())
    assert model.metadata() == plain.metadata()
    for source in (model, plain):
        source.close()


def test_gemma3_without_windows(tmp_path: Path) -> None:
    cases: dict[str, dict[str, Any]] = {
        "listed": {"layer_types": ["full_attention"] * 7},
        "by_period": {"layer_types": None, "sliding_window_pattern": 1},
    }
    for name, changes in cases.items():
        model = HubModel(copy_model("gemma3", changes, tmp_path / name))
        assert "gemma3.attention.sliding_window" not in model.metadata()
        model.close()


def test_lfm2_as_it_was_published(tmp_path: Path) -> None:
    """Its first config.json had other names for what transformers calls otherwise today."""
    older = {
        "intermediate_size": None,
        "block_ff_dim": 30,
        "layer_types": None,
        "full_attn_idxs": [1],
        "tie_word_embeddings": None,
        "tie_embedding": True,
        "rope_parameters": None,
        "rope_theta": 1000000.0,
    }
    plain = HubModel(ARCHITECTURES / "lfm2")
    model = HubModel(copy_model("lfm2", older, tmp_path))
    assert model.metadata() == plain.metadata()
    assert model.specs() == plain.specs()
    assert not model.notes()
    for source in (model, plain):
        source.close()
