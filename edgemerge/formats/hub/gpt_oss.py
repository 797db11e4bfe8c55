"""gpt-oss: experts in MXFP4 or plain, sinks of attention, a window in every second layer.

The keys are those of `GptOssModel` in llama.cpp's conversion/gpt_oss.py.
"""

from __future__ import annotations

from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.formats.hub.checker import Checker
from edgemerge.formats.hub.own_keys import Shapes, check_layer_types, windows
from edgemerge.formats.hub.reader import LENGTHS, TEXT, OwnShapes, Reader

__all__ = ["GPT_OSS"]

# `ggml_compute_forward_swiglu_oai` is called with these: src/llama-graph.cpp
ACTIVATION = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}
ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _keys(check: Checker, shapes: Shapes) -> dict[str, bytes]:
    if not check.flag("attention_bias"):
        raise check.unlike("attention_bias", False, "biases")
    for key, value in ACTIVATION.items():
        if (stated := check.number(key, value)) != value:
            raise check.unlike(key, stated, str(value))
    check_layer_types(check, windows(shapes.n_layers, 2))
    window, width = check.count("sliding_window"), check.count("intermediate_size")
    return {
        "attention.sliding_window": encode_value(window, "u32"),
        "expert_feed_forward_length": encode_value(width, "u32"),
    }


def _shapes(check: Checker, shapes: Shapes) -> OwnShapes:
    n, width = check.count("num_local_experts"), check.count("intermediate_size")
    return OwnShapes(
        stored={
            "attn_sinks.weight": (shapes.n_head,),
            "ffn_gate_inp.bias": (n,),
            "ffn_gate_exps.weight": (n, width, shapes.n_embd),
            "ffn_up_exps.weight": (n, width, shapes.n_embd),
            "ffn_down_exps.weight": (n, shapes.n_embd, width),
            "ffn_gate_exps.bias": (n, width),
            "ffn_up_exps.bias": (n, width),
            "ffn_down_exps.bias": (n, shapes.n_embd),
        }
    )


GPT_OSS: dict[str, Reader] = {
    "gpt_oss": Reader(
        ("GptOssForCausalLM",),
        (*TEXT, *LENGTHS, "attention.sliding_window", "expert_feed_forward_length"),
        ("default", "linear", "yarn"),
        {
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150000.0,
            "rope_parameters": ROPE,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
            "attention_bias": True,
        },
        own_keys=_keys,
        own_shapes=_shapes,
        states_head_dim=True,
        tied=False,
        experts=(("num_local_experts", "num_experts"), "num_experts_per_tok", "intermediate_size"),
    )
}
