"""The models that make_drawn_families.py describes: their shapes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["SHAPES", "DrawnShape"]

TINY = dict(
    hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
    num_hidden_layers=4, vocab_size=336, max_position_embeddings=128, head_dim=16,
)  # fmt: skip
# Heads of 8, whose values are 4 to 2 keys.
DELTA_NET = dict(
    linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
    linear_num_value_heads=4, linear_conv_kernel_dim=4, eos_token_id=330,
)  # fmt: skip
EXPERTS = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
    shared_expert_intermediate_size=16,
)  # fmt: skip
MROPE = dict(
    rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5, mrope_interleaved=True,
    mrope_section=[2, 1, 1],
)  # fmt: skip


@dataclass(frozen=True)
class DrawnShape:
    """One model."""

    model_type: str
    config: dict[str, Any]
    pre: str  # tokenizer.ggml.pre
    config_added: dict[str, Any] = field(default_factory=dict)
    config_removed: tuple[str, ...] = ()


SHAPES: dict[str, DrawnShape] = {
    "qwen3_5": DrawnShape(
        "qwen3_5_text", TINY | DELTA_NET | dict(tie_word_embeddings=True, rope_parameters=MROPE), "qwen35"
    ),
    "qwen3_5_moe": DrawnShape(
        "qwen3_5_moe_text", TINY | DELTA_NET | EXPERTS | dict(rope_parameters=MROPE), "qwen35"
    ),
    "qwen3_next": DrawnShape("qwen3_next", TINY | DELTA_NET | EXPERTS, "qwen2"),
}  # fmt: skip
