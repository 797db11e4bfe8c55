"""What config.json of one model type states alone, or in other words than GGUF does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgemerge.formats.hub.delta_net import FULL, LINEAR
from edgemerge.formats.hub.gemma3n import FIXED, SPARSE, sparsities
from edgemerge.formats.hub.gemma4 import SLIDING
from edgemerge.formats.hub.llama4 import UNNORMED
from edgemerge.formats.hub.made_rope import FREQUENCIES, head_length, read_factors
from edgemerge.formats.hub.own_keys import SIZE_OF_27B
from edgemerge.formats.hub.stated import Json, Stated

__all__ = ["KEYS", "OWN", "own_rope"]

ROWS_AT_ONCE = 256

# GGUF's key without the architecture's name -> config.json's
_STATE_SPACE = {
    "ssm.conv_kernel": "mamba_d_conv",
    "ssm.state_size": "mamba_d_state",
    "ssm.group_count": "mamba_n_groups",
    "ssm.inner_size": "mamba_expand",  # times the width of the model
    "ssm.time_step_rank": "mamba_n_heads",
}
_EXPERTS = {"expert_feed_forward_length": "moe_intermediate_size"}
_SHARED = {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
_DELTA_NET = {
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
    "full_attention_interval": "full_attention_interval",
}
_LAYERS = {
    "attention.shared_kv_layers": "num_kv_shared_layers",
    "embedding_length_per_layer_input": "hidden_size_per_layer_input",
}
KEYS: dict[str, dict[str, str]] = {
    "qwen3_moe": _EXPERTS,
    "qwen3_next": {**_EXPERTS, **_SHARED, **_DELTA_NET},
    "qwen3_5_text": _DELTA_NET,
    "qwen3_5_moe_text": {**_EXPERTS, **_SHARED, **_DELTA_NET},
    "granitemoeshared": {"expert_shared_feed_forward_length": "shared_intermediate_size"},
    "granitemoehybrid": _STATE_SPACE,
    "falcon_h1": {**_STATE_SPACE, "ssm.inner_size": "mamba_d_ssm"},
    "llama4_text": {
        "feed_forward_length": "intermediate_size_mlp",
        "expert_feed_forward_length": "intermediate_size",
        "interleave_moe_layer_step": "interleave_moe_layer_step",
    },
    "gemma3n_text": _LAYERS,
    "gemma4_text": {**_EXPERTS, **_LAYERS},
}


def _llama(stated: Stated, raw: Json) -> Json:
    return {
        "attention_bias": "blk.0.attn_q.bias" in stated.specs,
        "mlp_bias": "blk.0.ffn_up.bias" in stated.specs,
    }


def _gemma(stated: Stated, raw: Json) -> Json:
    model_type, n_layers = raw["model_type"], raw["num_hidden_layers"]
    is_27b = n_layers == SIZE_OF_27B[model_type]
    scalar = raw["hidden_size"] // raw["num_attention_heads"] if is_27b else None
    own: Json = {"query_pre_attn_scalar": scalar or raw.get("head_dim")}
    if (theta := stated.get("rope.freq_base_swa")) is not None:
        own["rope_local_base_freq"] = theta
    if model_type == "gemma3_text" and stated.get("attention.sliding_window") is None:
        own["layer_types"] = ["full_attention"] * n_layers
    return own


def _qwen3_moe(stated: Stated, raw: Json) -> Json:
    return {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}


def _phi3(stated: Stated, raw: Json) -> Json:
    rotated, length = stated.get("rope.dimension_count"), head_length(raw)
    return {
        "sliding_window": raw.get("sliding_window") or None,
        "original_max_position_embeddings": stated.get("rope.scaling.original_context_length"),
        "partial_rotary_factor": rotated / length if rotated and length else None,
    }


def _granite4(stated: Stated, raw: Json) -> Json:
    heads = stated.get_list("attention.head_count_kv", raw["num_hidden_layers"])
    width = raw.get("mamba_expand") or 0
    own: Json = {
        "layer_types": ["attention" if count else "mamba" for count in heads],
        "num_local_experts": stated.get("expert_count") or 0,
        # llama.cpp rotates where nothing is stated.
        "position_embedding_type": "nope"
        if stated.get("rope.scaling.finetuned") is False
        else "rope",
        "shared_intermediate_size": stated.get("expert_shared_feed_forward_length")
        or raw.get("intermediate_size"),
        "mamba_expand": width // max(1, raw["hidden_size"]),
    }
    if own["num_local_experts"]:
        own["num_experts_per_tok"] = stated.get("expert_used_count")
    return own


def _falcon_h1(stated: Stated, raw: Json) -> Json:
    """State no factors, as the weights have them."""
    has_norm = "blk.0.ssm_norm.weight" in stated.specs
    return {"mamba_rms_norm": has_norm, "mamba_norm_before_gate": not has_norm}


def _llama4(stated: Stated, raw: Json) -> Json:
    return {"use_qk_norm": raw["num_local_experts"] != UNNORMED}


def _lfm2(stated: Stated, raw: Json) -> Json:
    heads = stated.get_list("attention.head_count_kv", raw["num_hidden_layers"])
    return {
        "layer_types": ["full_attention" if count else "conv" for count in heads],
        "block_auto_adjust_ff_dim": False,
    }


def _olmo3(stated: Stated, raw: Json) -> Json:
    return {"layer_types": _windows(stated)}


def _windows(stated: Stated) -> list[str]:
    slides = stated.get("attention.sliding_window_pattern") or []
    return [SLIDING if slide else FULL for slide in slides]


# -- delta nets -----------------------------------------------------------------------------------


def _delta_net(stated: Stated, raw: Json) -> Json:
    own: Json = {"linear_value_head_dim": raw.get("linear_key_head_dim")}
    if recurs := stated.get("attention.recurrent_layers"):
        own["layer_types"] = [LINEAR if recurrent else FULL for recurrent in recurs]
    rotated, length = stated.get("rope.dimension_count"), head_length(raw)
    own["partial_rotary_factor"] = rotated / length if rotated else None
    return own


def _qwen3_next(stated: Stated, raw: Json) -> Json:
    return _qwen3_moe(stated, raw) | _delta_net(stated, raw)


# -- Gemma 3n and 4 -------------------------------------------------------------------------------


def _gemma3n(stated: Stated, raw: Json) -> Json:
    return {
        **FIXED,
        "layer_types": _windows(stated),
        "rope_local_base_freq": stated.get("rope.freq_base_swa"),
        SPARSE: sparsities(raw["num_hidden_layers"]),
        "vocab_size_per_layer_input": _count_rows(stated, "per_layer_token_embd.weight"),
    }


def _count_rows(stated: Stated, name: str) -> int:
    """Count the rows up to the last that is not 0: the converter adds such rows at the end."""
    n_rows = stated.specs[name].n_rows
    while n_rows:
        start = max(0, n_rows - ROWS_AT_ONCE)
        rows = stated.read_f32(name, start, n_rows).reshape(n_rows - start, -1)
        if (used := np.flatnonzero(rows.any(axis=1))).size:
            return start + int(used[-1]) + 1
        n_rows = start
    return stated.specs[name].n_rows


def _gemma4(stated: Stated, raw: Json) -> Json:
    n, windows = raw["num_hidden_layers"], _windows(stated)
    heads = dict(zip(windows, stated.get_list("attention.head_count_kv", n), strict=True))
    widths = stated.get_list("feed_forward_length", n)
    has_experts = bool(stated.get("expert_count"))
    last = max(
        i for i, kind in enumerate(windows) if kind == FULL and i < n - raw["num_kv_shared_layers"]
    )
    own: Json = {
        "layer_types": windows,
        "head_dim": stated.get("attention.key_length_swa"),
        "global_head_dim": stated.get("attention.key_length"),
        "num_key_value_heads": heads[SLIDING],
        "num_global_key_value_heads": heads[FULL] if heads[FULL] != heads[SLIDING] else None,
        "attention_k_eq_v": f"blk.{last}.attn_v.weight" not in stated.specs,
        "intermediate_size": min(widths),
        "use_double_wide_mlp": min(widths) < max(widths),
        "vocab_size_per_layer_input": raw["vocab_size"],
        "enable_moe_block": has_experts,
    }
    if has_experts:
        own["num_experts"] = stated.get("expert_count")
        own["top_k_experts"] = stated.get("expert_used_count")
    return own


OWN: dict[str, Callable[[Stated, Json], Json]] = {
    "llama": _llama,
    "gemma2": _gemma,
    "gemma3_text": _gemma,
    "gemma3n_text": _gemma3n,
    "gemma4_text": _gemma4,
    "qwen3_moe": _qwen3_moe,
    "qwen3_next": _qwen3_next,
    "qwen3_5_text": _delta_net,
    "qwen3_5_moe_text": _delta_net,
    "phi3": _phi3,
    "granitemoehybrid": _granite4,
    "falcon_h1": _falcon_h1,
    "llama4_text": _llama4,
    "lfm2": _lfm2,
    "olmo3": _olmo3,
}


# -- the rotation, where a family states it otherwise ---------------------------------------------


def own_rope(stated: Stated, raw: Json, rope: Json) -> Json | None:
    """Return what a model type states in place of the usual keys, or None.

    Parameters
    ----------
    stated : Stated
        The GGUF.
    raw : dict
        What was made so far.
    rope : dict
        The rotation as most families state it.
    """
    theta, scaling = rope["rope_theta"], rope.get("rope_scaling", {"rope_type": "default"})
    match raw["model_type"]:
        case "gpt_oss" if scaling["rope_type"] == "yarn":
            return {**rope, "rope_scaling": {**scaling, "truncate": False}}
        case "qwen3_5_text" | "qwen3_5_moe_text":
            sections = stated.get("rope.dimension_sections") or []
            own = {"rope_theta": theta, "partial_rotary_factor": raw["partial_rotary_factor"]}
            mixed = {"mrope_interleaved": True, "mrope_section": sections[:3]}
            return {"rope_parameters": {**scaling, **own, **mixed}}
        case "gemma4_text":
            factors = read_factors(stated, FREQUENCIES)
            part = np.count_nonzero(factors == 1) / max(1, factors.size)
            full = {"rope_type": "proportional", "partial_rotary_factor": part, "rope_theta": theta}
            local = {"rope_type": "default", "rope_theta": stated.get("rope.freq_base_swa")}
            return {"rope_parameters": {FULL: full, SLIDING: local}}
    return None
