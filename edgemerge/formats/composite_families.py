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

_FALCON = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm": "pre_ff_layernorm.weight",  # so it is called in GGUF
    **_ATTENTION,
    **{stem: hf for stem, hf in _MAMBA.items() if stem != "ssm_norm.weight"},
    **{stem: hf.replace("mlp.", "feed_forward.") for stem, hf in FFN.items()},
}
_FALCON_OUTSIDE = {**GLOBAL, "output_norm.weight": "model.final_layernorm.weight"}

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
