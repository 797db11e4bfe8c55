"""Names of tensors in hybrids with a gated delta net: Qwen3-Next, Qwen3.5 and its mixtures."""

from __future__ import annotations

from edgemerge.formats.family import FFN, OUTPUT, QK_NORM, QKV, Family

__all__ = ["DELTA_NETS"]

_ATTENTION = {**QKV, **QK_NORM, **OUTPUT}
_NORMS = {
    "attn_norm.weight": "input_layernorm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
}
_COMMON = {
    "ssm_a": "linear_attn.A_log",
    "ssm_conv1d.weight": "linear_attn.conv1d.weight",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "ssm_norm.weight": "linear_attn.norm.weight",
    "ssm_out.weight": "linear_attn.out_proj.weight",
}
_DELTA_NET = {
    **_COMMON,
    "attn_qkv.weight": "linear_attn.in_proj_qkv.weight",
    "attn_gate.weight": "linear_attn.in_proj_z.weight",
    "ssm_alpha.weight": "linear_attn.in_proj_a.weight",
    "ssm_beta.weight": "linear_attn.in_proj_b.weight",
}
_NEXT = {**_COMMON, "ssm_ba.weight": "linear_attn.in_proj_ba.weight"}
_ROUTED = {
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "ffn_gate_inp_shexp.weight": "mlp.shared_expert_gate.weight",
    "ffn_gate_shexp.weight": "mlp.shared_expert.gate_proj.weight",
    "ffn_up_shexp.weight": "mlp.shared_expert.up_proj.weight",
    "ffn_down_shexp.weight": "mlp.shared_expert.down_proj.weight",
}
_EXPERTS = {
    "ffn_down_exps.weight": "mlp.experts.{}.down_proj.weight",
    "ffn_gate_exps.weight": "mlp.experts.{}.gate_proj.weight",
    "ffn_up_exps.weight": "mlp.experts.{}.up_proj.weight",
}
_GATES = ("attn_qkv.weight", "attn_gate.weight")
_ONLY = {
    **dict.fromkeys((*_DELTA_NET, *_NEXT), "linear_attention"),
    **dict.fromkeys(_ATTENTION, "full_attention"),
}

# Rows of `FAMILIES`
DELTA_NETS: dict[str, Family] = {
    "qwen3_next": Family(
        "qwen3next",
        {**_NORMS, **_ATTENTION, **_NEXT, **_ROUTED},
        experts=_EXPERTS,
        halves={"linear_attn.in_proj_qkvz.weight": _GATES},
        only=_ONLY,
        norm_offset=1.0,
    ),
    "qwen3_5_text": Family(
        "qwen35",
        {**_NORMS, **_ATTENTION, **_DELTA_NET, **FFN},
        only=_ONLY,
        norm_offset=1.0,
        towers=("visual.",),
    ),
    "qwen3_5_moe_text": Family(
        "qwen35moe",
        {**_NORMS, **_ATTENTION, **_DELTA_NET, **_ROUTED},
        experts=_EXPERTS,
        only=_ONLY,
        norm_offset=1.0,
        towers=("visual.",),
    ),
}
