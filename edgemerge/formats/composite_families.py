"""Names of tensors in mixtures that store experts in stacks, and in hybrids with a state space."""

from __future__ import annotations

from edgemerge.formats.family import FFN, GLOBAL, NORMS_BEFORE, OUTPUT, QKV, Family

__all__ = ["COMPOSITES", "VARIANTS"]

_ATTENTION = {**QKV, **OUTPUT}
_STACK = {
    "ffn_gate_inp.weight": "block_sparse_moe.router.layer.weight",
    "ffn_down_exps.weight": "block_sparse_moe.output_linear.weight",
}
_STACK_HALVES = {
    "block_sparse_moe.input_linear.weight": ("ffn_gate_exps.weight", "ffn_up_exps.weight")
}
_SHARED = {"ffn_down_shexp.weight": "shared_mlp.output_linear.weight"}
_SHARED_HALVES = {
    "shared_mlp.input_linear.weight": ("ffn_gate_shexp.weight", "ffn_up_shexp.weight")
}
_DENSE = {"ffn_down.weight": "shared_mlp.output_linear.weight"}
_DENSE_HALVES = {"shared_mlp.input_linear.weight": ("ffn_gate.weight", "ffn_up.weight")}
_MAMBA = {
    "ssm_in.weight": "mamba.in_proj.weight",
    "ssm_conv1d.weight": "mamba.conv1d.weight",
    "ssm_conv1d.bias": "mamba.conv1d.bias",
    "ssm_dt.bias": "mamba.dt_bias",
    "ssm_a": "mamba.A_log",
    "ssm_d": "mamba.D",
    "ssm_norm.weight": "mamba.norm.weight",
    "ssm_out.weight": "mamba.out_proj.weight",
}
_BY_LAYER = {**dict.fromkeys(_MAMBA, "mamba"), **dict.fromkeys(_ATTENTION, "attention")}

_MIXTURE = {**NORMS_BEFORE, **_ATTENTION, **_STACK}

_FEED_FORWARD = {stem: hf.replace("mlp.", "feed_forward.") for stem, hf in FFN.items()}
_FALCON = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm": "pre_ff_layernorm.weight",  # so it is called in GGUF
    **_ATTENTION,
    **{stem: hf for stem, hf in _MAMBA.items() if stem != "ssm_norm.weight"},
    **_FEED_FORWARD,
}
_FALCON_OUTSIDE = {**GLOBAL, "output_norm.weight": "model.final_layernorm.weight"}

_LLAMA4_EXPERTS = {
    "ffn_gate_inp.weight": "feed_forward.router.weight",
    "ffn_gate_shexp.weight": "feed_forward.shared_expert.gate_proj.weight",
    "ffn_up_shexp.weight": "feed_forward.shared_expert.up_proj.weight",
    "ffn_down_shexp.weight": "feed_forward.shared_expert.down_proj.weight",
}
_LLAMA4_COLUMNS = {
    "feed_forward.experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "feed_forward.experts.down_proj": ("ffn_down_exps.weight",),
}
_LLAMA4_ONLY = {
    **dict.fromkeys(_FEED_FORWARD, "dense"),
    **dict.fromkeys(_LLAMA4_EXPERTS, "experts"),
    **{stem: "experts" for stems in _LLAMA4_COLUMNS.values() for stem in stems},
}

_GPT_OSS = {
    "attn_norm.weight": "input_layernorm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    **_ATTENTION,
    **{
        stem.replace(".weight", ".bias"): hf.replace(".weight", ".bias")
        for stem, hf in _ATTENTION.items()
    },
    "attn_sinks.weight": "self_attn.sinks",
    "ffn_gate_inp.weight": "mlp.router.weight",
    "ffn_gate_inp.bias": "mlp.router.bias",
}
_GPT_OSS_COLUMNS = {
    "mlp.experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "mlp.experts.gate_up_proj_bias": ("ffn_gate_exps.bias", "ffn_up_exps.bias"),
    "mlp.experts.down_proj": ("ffn_down_exps.weight",),
    "mlp.experts.down_proj_bias": ("ffn_down_exps.bias",),
}

# Rows of `FAMILIES`
COMPOSITES: dict[str, Family] = {
    "granitemoe": Family("granitemoe", _MIXTURE, halves=_STACK_HALVES, rotates_pairs=True),
    "granitemoeshared": Family(
        "granitemoe",
        {**_MIXTURE, **_SHARED},
        halves={**_STACK_HALVES, **_SHARED_HALVES},
        rotates_pairs=True,
    ),
    "granitemoehybrid": Family(
        "granite",
        {**NORMS_BEFORE, **_ATTENTION, **_DENSE},
        halves=_DENSE_HALVES,
        rotates_pairs=True,
    ),
    "falcon_h1": Family("falcon-h1", _FALCON, outside=_FALCON_OUTSIDE),
    "gpt_oss": Family("gpt-oss", _GPT_OSS, columns=_GPT_OSS_COLUMNS, deals_in_turn=True),
    "llama4_text": Family(
        "llama4",
        {**NORMS_BEFORE, **_ATTENTION, **_FEED_FORWARD, **_LLAMA4_EXPERTS},
        columns=_LLAMA4_COLUMNS,
        only=_LLAMA4_ONLY,
    ),
}

# What else a model type may be, going by config.json
VARIANTS: dict[str, Family] = {
    "granitemoehybrid+experts": COMPOSITES["granitemoeshared"],
    "granitemoehybrid+mamba": Family(
        "granitehybrid",
        {**NORMS_BEFORE, **_ATTENTION, **_MAMBA, **_DENSE},
        halves=_DENSE_HALVES,
        only=_BY_LAYER,
        rotates_pairs=True,
    ),
    "granitemoehybrid+mamba+experts": Family(
        "granitehybrid",
        {**_MIXTURE, **_MAMBA, **_SHARED},
        halves={**_STACK_HALVES, **_SHARED_HALVES},
        only=_BY_LAYER,
        rotates_pairs=True,
    ),
    "falcon_h1+norm": Family(
        "falcon-h1",
        {**_FALCON, "ssm_norm.weight": _MAMBA["ssm_norm.weight"]},
        outside=_FALCON_OUTSIDE,
    ),
}
