"""Llama 4, its text model: layers of experts, windows that are cut into chunks, layers without rotation.

The keys are those of `Llama4Model` in llama.cpp's conversion/llama.py. llama.cpp has most of the numbers in
its source (src/models/llama4.cpp), so a model with others is refused.
"""

from __future__ import annotations

from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.formats.hub.checker import Checker
from edgemerge.formats.hub.own_keys import Shapes
from edgemerge.formats.hub.reader import LLAMA, OwnShapes, Reader

__all__ = ["LLAMA4", "UNNORMED"]

PERIOD = 4  # every fourth layer has neither chunks nor rotation
UNNORMED = 128  # llama.cpp knows by this count of experts that q and k are not normed
FIXED = {"attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1}


def _layers(check: Checker, shapes: Shapes) -> tuple[str, ...]:
    """Return which layers have experts: one of each `interleave_moe_layer_step`."""
    step, n = check.count("interleave_moe_layer_step"), shapes.n_layers
    wanted = list(range(step - 1, n, step))
    if (stated := check.get("moe_layers")) not in (None, wanted):
        raise check.unlike("moe_layers", stated, f"experts in every layer {step}")
    return tuple("dense" if (i + 1) % step else "experts" for i in range(n))


def _keys(check: Checker, shapes: Shapes) -> dict[str, bytes]:
    turned = [int((i + 1) % PERIOD != 0) for i in range(shapes.n_layers)]
    stated = check.get("no_rope_layers")
    if not stated:
        period = check.count("no_rope_layer_interval")
        stated = [int((i + 1) % period != 0) for i in range(shapes.n_layers)]
    if stated != turned:
        raise check.unlike("no_rope_layers", stated, f"every layer {PERIOD} without rotation")
    kinds = ["chunked_attention" if turn else "full_attention" for turn in turned]
    if (stated := check.get("layer_types")) not in (None, kinds):
        raise check.unlike("layer_types", stated, f"full attention in every layer {PERIOD}")
    for key, value in FIXED.items():
        if (stated := check.raw.get(key, value)) != value:
            raise check.unlike(key, stated, str(value))
    if not check.get("attn_temperature_tuning"):  # 4 in older files
        raise check.unlike("attn_temperature_tuning", False, "true")
    is_normed = check.count("num_local_experts") != UNNORMED
    if check.flag("use_qk_norm") != is_normed:
        raise check.unlike("use_qk_norm", not is_normed, str(is_normed).lower())
    step, width = check.count("interleave_moe_layer_step"), check.count("intermediate_size")
    return {
        "interleave_moe_layer_step": encode_value(step, "u32"),
        "expert_feed_forward_length": encode_value(width, "u32"),
    }


def _shapes(check: Checker, shapes: Shapes) -> OwnShapes:
    n, width = check.count("num_local_experts"), check.count("intermediate_size")
    up, down = (width, shapes.n_embd), (shapes.n_embd, width)
    return OwnShapes(
        stored={
            "ffn_gate_exps.weight": (n, *up),
            "ffn_up_exps.weight": (n, *up),
            "ffn_down_exps.weight": (n, *down),
            "ffn_gate_shexp.weight": up,
            "ffn_up_shexp.weight": up,
            "ffn_down_shexp.weight": down,
        }
    )


def _dense_width(check: Checker) -> int:
    return check.count("intermediate_size_mlp")


LLAMA4: dict[str, Reader] = {
    "llama4_text": Reader(
        ("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
        (*LLAMA, "interleave_moe_layer_step", "expert_feed_forward_length"),
        ("default", "llama3"),
        {
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "intermediate_size": 8192,
            "intermediate_size_mlp": 16384,
            "num_local_experts": 16,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
            "use_qk_norm": True,
            "no_rope_layer_interval": PERIOD,
            "attn_temperature_tuning": True,
        },
        own_keys=_keys,
        own_shapes=_shapes,
        layer_kinds=_layers,
        width=_dense_width,
        states_head_dim=True,
        experts=(("num_local_experts",), "num_experts_per_tok", "intermediate_size"),
    )
}
