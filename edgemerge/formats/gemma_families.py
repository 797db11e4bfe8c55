"""Names of tensors in Gemma 3n and 4: embeddings of layers, alternating updates, experts."""

from __future__ import annotations

from edgemerge.formats.family import FFN, GLOBAL, OUTPUT, QK_NORM, QKV, Family

__all__ = ["GEMMAS", "GEMMA_VARIANTS"]

_NORMS = {
    "attn_norm.weight": "input_layernorm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
}
_EMBEDDED = {
    "inp_gate.weight": "per_layer_input_gate.weight",
    "proj.weight": "per_layer_projection.weight",
    "post_norm.weight": "post_per_layer_input_norm.weight",
}
_OUTSIDE = {
    **GLOBAL,
    "per_layer_token_embd.weight": "model.embed_tokens_per_layer.weight",
    "per_layer_model_proj.weight": "model.per_layer_model_projection.weight",
    "per_layer_proj_norm.weight": "model.per_layer_projection_norm.weight",
}
_UPDATED = {
    "altup_correct_scale.weight": "altup.correct_output_scale",
    "altup_correct_coef.weight": "altup.correction_coefs.weight",
    "altup_predict_coef.weight": "altup.prediction_coefs.weight",
    "altup_router.weight": "altup.modality_router.weight",
    "altup_router_norm.weight": "altup.router_norm.weight",
    "laurel_l.weight": "laurel.linear_left.weight",
    "laurel_r.weight": "laurel.linear_right.weight",
    "laurel_post_norm.weight": "laurel.post_laurel_norm.weight",
}
# Each of three matrices; GGUF has them as one stack, and the last stands for all.
_STACKS = {
    "altup_proj.weight": "model.altup_projections.2.weight",
    "altup_unembd_proj.weight": "model.altup_unembed_projections.2.weight",
}
_GEMMA4 = {
    **_NORMS,
    **QKV,
    **QK_NORM,
    **OUTPUT,
    **FFN,
    "layer_output_scale.weight": "layer_scalar",
}
_EXPERTS = {
    "post_ffw_norm_1.weight": "post_feedforward_layernorm_1.weight",
    "post_ffw_norm_2.weight": "post_feedforward_layernorm_2.weight",
    "pre_ffw_norm_2.weight": "pre_feedforward_layernorm_2.weight",
    "ffn_gate_inp.weight": "router.proj.weight",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "ffn_gate_up_exps.weight": "experts.gate_up_proj",
    "ffn_down_exps.weight": "experts.down_proj",
}
# Some layers take their keys and values from an earlier one, some take their values from their keys.
_ONLY = {
    "attn_k.weight": "own|keys",
    "attn_k_norm.weight": "own|keys",
    "attn_v.weight": "own",
}

_TOWERS = ("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio.")

# Rows of `FAMILIES`
GEMMAS: dict[str, Family] = {
    "gemma3n_text": Family(
        "gemma3n",
        {**_NORMS, **QKV, **QK_NORM, **OUTPUT, **FFN, **_EMBEDDED, **_UPDATED},
        outside={**_OUTSIDE, **_STACKS},
        towers=_TOWERS,
    ),
    "gemma4_text": Family("gemma4", _GEMMA4, only=_ONLY, towers=_TOWERS),
}

# What else a model type may be, going by config.json
GEMMA_VARIANTS: dict[str, Family] = {
    "gemma4_text+experts": Family("gemma4", {**_GEMMA4, **_EXPERTS}, only=_ONLY, towers=_TOWERS),
    "gemma4_text+embeddings": Family(
        "gemma4", {**_GEMMA4, **_EMBEDDED}, outside=_OUTSIDE, only=_ONLY, towers=_TOWERS
    ),
    "gemma4_text+experts+embeddings": Family(
        "gemma4",
        {**_GEMMA4, **_EXPERTS, **_EMBEDDED},
        outside=_OUTSIDE,
        only=_ONLY,
        towers=_TOWERS,
    ),
}
