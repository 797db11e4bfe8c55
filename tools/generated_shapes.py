"""The models that make_generated_models.py describes: their shapes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["SHAPES", "GeneratedShape", "with_packed_experts"]

TINY = dict(
    hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
    num_hidden_layers=2, vocab_size=336, max_position_embeddings=128,
)  # fmt: skip
EXPERTS = dict(intermediate_size=24, num_local_experts=4, num_experts_per_tok=2)
SCALES = dict(
    embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.25,
)  # fmt: skip
MAMBA = dict(
    num_hidden_layers=3, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=16, mamba_n_groups=2,
)  # fmt: skip
FALCON = TINY | MAMBA | dict(
    num_hidden_layers=2, mamba_d_ssm=48, mamba_n_heads=6, head_dim=12,
    embedding_multiplier=1.5, lm_head_multiplier=0.75, key_multiplier=0.5,
    attention_in_multiplier=1.25, attention_out_multiplier=0.9375, ssm_in_multiplier=1.25,
    ssm_out_multiplier=0.7, mlp_multipliers=[0.88, 0.8], ssm_multipliers=[0.9, 0.8, 0.7, 0.6, 1.1],
    rope_parameters=dict(rope_type="default", rope_theta=1e6),
)  # fmt: skip
# Here the limits of YaRN are whole numbers, so that it is the same whether they are rounded.
GPT_OSS = TINY | EXPERTS | dict(
    hidden_size=64, intermediate_size=32, head_dim=16, sliding_window=8,
    rope_parameters=dict(
        rope_type="yarn", rope_theta=1769.0, factor=4.0, beta_fast=32.0, beta_slow=1.0,
        truncate=False, original_max_position_embeddings=16,
    ),
)  # fmt: skip
LAYERS = ["mamba", "attention", "mamba"]


@dataclass(frozen=True)
class GeneratedShape:
    """One model."""

    model_type: str
    config: dict[str, Any]
    pre: str  # tokenizer.ggml.pre
    config_added: dict[str, Any] = field(default_factory=dict)
    config_removed: tuple[str, ...] = ()
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)  # changes of config.json
    packs_experts: bool = False  # stores them as MXFP4
    text: str | None = None  # which the tokenizer cuts; None: that of make_architecture_fixtures.py


def with_packed_experts(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """Return the names and shapes of the same model with its experts in MXFP4."""
    packed = {}
    for name, shape in shapes.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            n_experts, n_in, n_out = shape
            packed[f"{name}_blocks"] = [n_experts, n_out, n_in // 32, 16]
            packed[f"{name}_scales"] = [n_experts, n_out, n_in // 32]
        else:
            packed[name] = shape
    return packed


SHAPES: dict[str, GeneratedShape] = {
    "granite_moe": GeneratedShape("granitemoe", TINY | EXPERTS | SCALES, "dbrx"),
    "granite_moe_shared": GeneratedShape(
        "granitemoeshared", TINY | EXPERTS | SCALES | dict(shared_intermediate_size=16), "dbrx"
    ),
    "granite4_moe": GeneratedShape(
        "granitemoehybrid",
        TINY | EXPERTS | SCALES | dict(
            shared_intermediate_size=16, position_embedding_type="rope",
            layer_types=["full_attention"] * 2, mamba_n_heads=8,
        ),
        "dbrx",
        config_added=dict(layer_types=["attention"] * 2),
    ),
    "granite4_nope": GeneratedShape(
        "granitemoehybrid",
        TINY | SCALES | dict(
            shared_intermediate_size=48, num_local_experts=0, num_experts_per_tok=0,
            layer_types=["full_attention"] * 2, mamba_n_heads=8,
        ),
        "dbrx",
        config_added=dict(layer_types=["attention"] * 2),
    ),
    "granite4_hybrid": GeneratedShape(
        "granitemoehybrid",
        TINY | MAMBA | SCALES | dict(
            shared_intermediate_size=48, num_local_experts=0, num_experts_per_tok=0,
            layer_types=LAYERS, tie_word_embeddings=True,
        ),
        "dbrx",
        config_added=dict(layer_types=LAYERS, position_embedding_type="nope"),
        variants={"rope": {"position_embedding_type": "rope"}},
    ),
    "granite4_hybrid_moe": GeneratedShape(
        "granitemoehybrid",
        TINY | MAMBA | EXPERTS | SCALES | dict(shared_intermediate_size=16, layer_types=LAYERS),
        "dbrx",
        config_added=dict(layer_types=LAYERS),
    ),
    "falcon_h1": GeneratedShape("falcon_h1", FALCON, "falcon-h1"),
    "falcon_h1_norm": GeneratedShape(
        "falcon_h1",
        FALCON | dict(
            mamba_rms_norm=True, mamba_norm_before_gate=False, tie_word_embeddings=True,
            lm_head_multiplier=1.0,
        ),
        "falcon-h1",
    ),
    "gpt_oss": GeneratedShape(
        "gpt_oss",
        GPT_OSS,
        "gpt-4o",
        config_added=dict(quantization_config=dict(
            quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn"],
        )),
        packs_experts=True,
    ),
    "gpt_oss_plain": GeneratedShape("gpt_oss", GPT_OSS, "gpt-4o"),
    "llama4": GeneratedShape(
        "llama4_text",
        TINY | EXPERTS | dict(
            num_hidden_layers=4, head_dim=8, intermediate_size_mlp=40, interleave_moe_layer_step=2,
        ),
        "llama4",
        variants={"llama3": {"rope_parameters": dict(
            rope_type="llama3", rope_theta=5000.0, factor=8.0, low_freq_factor=1.0,
            high_freq_factor=4.0, original_max_position_embeddings=16,
        )}},
    ),
}  # fmt: skip
