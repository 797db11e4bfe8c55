"""Names of tensors, against gguf's own table."""

import gguf
import pytest

from edgemerge.formats import architectures as arch

N_LAYERS = 3
SHARED = "shared_mlp."
MODEL_ARCHS = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}


def all_names(model_type: str) -> list[tuple[str, str]]:
    family = arch.KINDS_OF_MODEL[model_type]
    pairs = list(family.outside.items())
    for i in range(N_LAYERS):
        pairs += [(f"blk.{i}.{g}", f"model.layers.{i}.{h}") for g, h in family.block.items()]
    return pairs


@pytest.mark.parametrize("model_type", arch.KINDS_OF_MODEL)
def test_names_are_those_of_the_converter(model_type: str) -> None:
    architecture = MODEL_ARCHS[arch.KINDS_OF_MODEL[model_type].architecture]
    theirs = gguf.get_tensor_name_map(architecture, N_LAYERS)
    for gguf_name, hf_name in all_names(model_type):
        # Gemma 2 is always tied; `modify_tensors` of GraniteMoeModel and Gemma4Model names these by itself.
        own = any(part in hf_name for part in (SHARED, "router.scale", "router.per_expert_scale"))
        if (hf_name, model_type) != ("lm_head.weight", "gemma2") and not own:
            # as `filter_tensors` of Mamba2Model, GptOssModel, and of Gemma 3n and 4
            listed = hf_name.replace(".dt_bias", ".dt_proj.bias").replace("sinks", "sinks.weight")
            listed = listed.replace(
                "projections.2.", "projections."
            )  # of `Gemma3NModel`: one of a stack
            if listed.endswith(("layer_scalar", "output_scale", "_proj")):
                listed += ".weight"
            assert theirs.get_name(listed, try_suffixes=(".weight", ".bias")) == gguf_name


@pytest.mark.parametrize("model_type", arch.KINDS_OF_MODEL)
def test_names_go_there_and_back(model_type: str) -> None:
    for gguf_name, hf_name in all_names(model_type):
        assert arch.gguf_name(model_type, hf_name) == gguf_name
        if SHARED not in hf_name:  # Granite 3's names go for both
            assert arch.hf_name(arch.KINDS_OF_MODEL[model_type].architecture, gguf_name) == hf_name


def test_columns_that_are_dealt_out() -> None:
    name = "model.layers.1.mlp.experts.gate_up_proj"
    owners = ("blk.1.ffn_gate_exps.weight", "blk.1.ffn_up_exps.weight")
    assert arch.column_names("gpt_oss", name) == owners
    assert [arch.hf_name("gpt-oss", owner) for owner in owners] == [name, name]
    assert arch.column_names("gpt_oss", "model.norm.weight") == ()
    assert arch.column_names("llama", name) == ()


def test_two_matrices_that_are_stored_as_one() -> None:
    name = "model.layers.1.shared_mlp.input_linear.weight"
    assert arch.half_names("granitemoehybrid", name) == (
        "blk.1.ffn_gate.weight",
        "blk.1.ffn_up.weight",
    )
    assert arch.half_names("granite", name) is None
    assert arch.half_names("granitemoehybrid", "model.norm.weight") is None


@pytest.mark.parametrize(
    ("model_type", "name", "expected"),
    [
        (
            "mixtral",
            "model.layers.2.block_sparse_moe.experts.7.w1.weight",
            ("blk.2.ffn_gate_exps.weight", 7),
        ),
        (
            "qwen3_moe",
            "model.layers.0.mlp.experts.127.down_proj.weight",
            ("blk.0.ffn_down_exps.weight", 127),
        ),
        ("qwen3_moe", "model.layers.0.mlp.experts.1.w1.weight", None),
        ("qwen3_moe", "model.layers.0.mlp.experts.01.up_proj.weight", None),
        ("llama", "model.layers.0.block_sparse_moe.experts.0.w1.weight", None),
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", None),
        ("mixtral", "lm_head.weight", None),
    ],
)
def test_expert_name(model_type: str, name: str, expected: tuple[str, int] | None) -> None:
    assert arch.expert_name(model_type, name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("vision_tower.vision_model.embeddings.patch_embedding.weight", None),
        ("model.multi_modal_projector.mm_soft_emb_norm.weight", None),
    ],
)
def test_text_name(name: str, expected: str | None) -> None:
    assert arch.text_name(name) == expected


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
    assert arch.gguf_name("llama", name) is None


@pytest.mark.parametrize(
    ("architecture", "name", "expected"),
    [
        ("llama", "rope_freqs.weight", None),
        ("llama", "blk.1.attn_q_norm.weight", None),
        ("llama", "blk.12.ffn_norm.weight", "model.layers.12.post_attention_layernorm.weight"),
        (
            "llama",
            "blk.3.ffn_up_exps.weight",
            "model.layers.3.block_sparse_moe.experts.w3.weight",
        ),
        ("llama", "blk.0.ffn_gate_inp.weight", "model.layers.0.block_sparse_moe.gate.weight"),
        ("qwen3moe", "blk.0.ffn_down_exps.weight", "model.layers.0.mlp.experts.down_proj.weight"),
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
        ("lfm2", "token_embd_norm.weight", "model.embedding_norm.weight"),
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
    assert set(arch.ROTARY_HEADS) <= set(arch.KINDS_OF_MODEL["llama"].block)
