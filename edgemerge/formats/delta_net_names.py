"""Names of the tensors that a gated delta net has beside attention: Qwen3-Next, Qwen3.5 and its mixtures.

As in `edgemerge.formats.architectures`, GGUF's name stands left and Hugging Face's right.
"""

from __future__ import annotations

__all__ = ["DELTA_NET", "DELTA_NET_ONLY", "QWEN3_NEXT", "SHARED_EXPERT"]

_COMMON = {
    "ssm_a": "linear_attn.A_log",
    "ssm_conv1d.weight": "linear_attn.conv1d.weight",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "ssm_norm.weight": "linear_attn.norm.weight",
    "ssm_out.weight": "linear_attn.out_proj.weight",
}
DELTA_NET: dict[str, str] = {
    **_COMMON,
    "attn_qkv.weight": "linear_attn.in_proj_qkv.weight",
    "attn_gate.weight": "linear_attn.in_proj_z.weight",
    "ssm_alpha.weight": "linear_attn.in_proj_a.weight",
    "ssm_beta.weight": "linear_attn.in_proj_b.weight",
}
QWEN3_NEXT: dict[str, str] = {**_COMMON, "ssm_ba.weight": "linear_attn.in_proj_ba.weight"}
SHARED_EXPERT: dict[str, str] = {
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "ffn_gate_inp_shexp.weight": "mlp.shared_expert_gate.weight",
    "ffn_gate_shexp.weight": "mlp.shared_expert.gate_proj.weight",
    "ffn_up_shexp.weight": "mlp.shared_expert.up_proj.weight",
    "ffn_down_shexp.weight": "mlp.shared_expert.down_proj.weight",
}
_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output", "attn_q_norm", "attn_k_norm")
# The kind of layer, as `layer_types` of config.json has it, that alone has such a tensor
DELTA_NET_ONLY: dict[str, str] = {
    **dict.fromkeys((*DELTA_NET, *QWEN3_NEXT), "linear_attention"),
    "linear_attn.in_proj_qkvz.weight": "linear_attention",  # cut in two, so it has no GGUF name
    **{f"{name}.weight": "full_attention" for name in _ATTENTION},
}
