"""Names of tensors, against gguf's own table."""

import gguf
import pytest

from edgemerge import architectures as arch

N_LAYERS = 3


def all_llama_names() -> list[tuple[str, str]]:
    pairs = list(arch.LLAMA_GLOBAL.items())
    for i in range(N_LAYERS):
        pairs += [(f"blk.{i}.{g}", f"model.layers.{i}.{h}") for g, h in arch.LLAMA_BLOCK.items()]
    return pairs


def test_names_are_those_of_the_converter() -> None:
    theirs = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, N_LAYERS)
    for gguf_name, hf_name in all_llama_names():
        assert theirs.get_name(hf_name, try_suffixes=(".weight", ".bias")) == gguf_name


def test_llama_names_go_there_and_back() -> None:
    for gguf_name, hf_name in all_llama_names():
        assert arch.gguf_name(hf_name) == gguf_name
        assert arch.hf_name("llama", gguf_name) == hf_name


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.00.mlp.up_proj.weight",
        "model.layers.-1.mlp.up_proj.weight",
        "model.layers.0.block_sparse_moe.gate.weight",
        "model.embed_tokens.bias",
        "lm_head.weight.scale",
        "",
    ],
)
def test_unknown_hugging_face_names(name: str) -> None:
    assert arch.gguf_name(name) is None


@pytest.mark.parametrize(
    ("architecture", "name", "expected"),
    [
        ("llama", "rope_freqs.weight", None),
        ("llama", "blk.1.attn_q_norm.weight", None),
        ("llama", "blk.12.ffn_norm.weight", "model.layers.12.post_attention_layernorm.weight"),
        ("qwen2", "blk.0.attn_k.bias", "model.layers.0.self_attn.k_proj.bias"),
        ("qwen3", "blk.7.attn_q_norm.weight", "model.layers.7.self_attn.q_norm.weight"),
        ("qwen3", "token_embd.weight", "model.embed_tokens.weight"),
        ("gemma", "blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
        ("gemma3", "blk.0.ffn_norm.weight", "model.layers.0.pre_feedforward_layernorm.weight"),
        (
            "gemma2",
            "blk.0.post_attention_norm.weight",
            "model.layers.0.post_attention_layernorm.weight",
        ),
        ("phi3", "blk.0.attn_qkv.weight", "model.layers.0.self_attn.qkv_proj.weight"),
        ("phi3", "blk.0.ffn_up.weight", "model.layers.0.mlp.gate_up_proj.weight"),
        ("phi2", "blk.0.ffn_up.bias", "model.layers.0.mlp.fc1.bias"),
        ("phi2", "output_norm.bias", "model.final_layernorm.bias"),
        ("qwen2", "output.weight", "lm_head.weight"),
        ("mamba", "blk.0.ssm_a", None),
        ("qwen3", "blk.0.attn_rot_embd.weight", None),
        ("qwen3", "nonsense", None),
    ],
)
def test_hf_name(architecture: str, name: str, expected: str | None) -> None:
    assert arch.hf_name(architecture, name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blk.0.attn_q.weight", 0),
        ("blk.79.ffn_up.weight", 79),
        ("blk.x.ffn_up.weight", None),
        ("blk.1", None),
        ("token_embd.weight", None),
    ],
)
def test_layer_index(name: str, expected: int | None) -> None:
    assert arch.layer_index(name) == expected


def test_ignored_tensors() -> None:
    assert arch.is_ignored("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert arch.is_ignored("model.rotary_emb.inv_freq")
    assert not arch.is_ignored("model.norm.weight")


def test_rotary_tensors_are_known_ones() -> None:
    assert set(arch.ROTARY_HEADS) <= set(arch.LLAMA_BLOCK)
