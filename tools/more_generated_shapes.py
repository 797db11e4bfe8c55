"""More models that make_generated_models.py describes: hybrids with a delta net."""

from __future__ import annotations

from tools.generated_shapes import TINY, GeneratedShape

__all__ = ["MORE_SHAPES"]

# Marks beside letters, which Qwen3.5 keeps together
TEXT = "Ça coûte 3.14 + 10000 €, naïve?  🦙\n\tdef f(x):\n\n    return x[1:] != 'it''s'  # नमस्ते"
DELTA_NET = TINY | dict(
    num_hidden_layers=4, head_dim=16, linear_key_head_dim=8, linear_value_head_dim=8,
    linear_num_key_heads=2, linear_num_value_heads=6, linear_conv_kernel_dim=4, eos_token_id=330,
)  # fmt: skip
EXPERTS = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
    shared_expert_intermediate_size=16,
)  # fmt: skip
SECTIONS = dict(
    rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5, mrope_interleaved=True,
    mrope_section=[2, 1, 1],
)  # fmt: skip
GEMMA4 = TINY | dict(
    num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=8, global_head_dim=16,
    vocab_size=390, vocab_size_per_layer_input=390, hidden_size_per_layer_input=0, sliding_window=8,
    layer_types=["sliding_attention", "full_attention"] * 3, final_logit_softcapping=30.0,
)  # fmt: skip
# llama.cpp knows these numbers and no others: 20 layers with keys and values, 256, 64, 4 and 30.
GEMMA3N = TINY | dict(
    num_hidden_layers=22, num_kv_shared_layers=2, num_attention_heads=2, num_key_value_heads=1,
    head_dim=8, intermediate_size=256, hidden_size_per_layer_input=256, vocab_size=384,
    vocab_size_per_layer_input=382, sliding_window=8,
)  # fmt: skip
GEMMA_TEXT = "And the  sand,\n\n\nthen   and <b>3 é 🦙\n and"

YARN = SECTIONS | dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)

MORE_SHAPES: dict[str, GeneratedShape] = {
    "qwen3_next": GeneratedShape(
        "qwen3_next", DELTA_NET | EXPERTS, "qwen2",
        variants={"yarn": {"rope_parameters": {k: v for k, v in YARN.items() if "mrope" not in k}}},
    ),
    "qwen3_5": GeneratedShape(
        "qwen3_5_text",
        DELTA_NET | dict(tie_word_embeddings=True, rope_parameters=SECTIONS),
        "qwen35",
        text=TEXT,
        variants={"yarn": {"rope_parameters": YARN}},
    ),
    "qwen3_5_moe": GeneratedShape(
        "qwen3_5_moe_text",
        DELTA_NET | EXPERTS | dict(rope_parameters=SECTIONS),
        "qwen35",
        config_removed=("intermediate_size",),
    ),
    "gemma3n": GeneratedShape("gemma3n_text", GEMMA3N, "default"),
    "gemma4": GeneratedShape(
        "gemma4_text",
        GEMMA4 | dict(hidden_size_per_layer_input=8, num_kv_shared_layers=2, use_double_wide_mlp=True),
        "gemma4",
        text=GEMMA_TEXT,
    ),
    "gemma4_keys": GeneratedShape(
        "gemma4_text",
        GEMMA4 | dict(attention_k_eq_v=True, num_global_key_value_heads=1),
        "gemma4",
        text=GEMMA_TEXT,
    ),
    "gemma4_moe": GeneratedShape(
        "gemma4_text",
        GEMMA4 | dict(
            enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=24,
        ),
        "gemma4",
        text=GEMMA_TEXT,
    ),
}  # fmt: skip
