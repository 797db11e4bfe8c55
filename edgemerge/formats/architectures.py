"""Tables: how Hugging Face and GGUF name the tensors of each architecture.

Names on the left are GGUF's without `blk.N.`, on the right Hugging Face's without
`model.layers.N.`; the suffix (`.weight`, `.bias`) is the same in both. GGUF's side is
`MODEL_TENSORS` of gguf-py/gguf/constants.py, the other its tensor_mapping.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from edgemerge.formats.composite_families import COMPOSITES, VARIANTS
from edgemerge.formats.delta_net_families import DELTA_NETS
from edgemerge.formats.family import (
    FFN,
    GLOBAL,
    NORMS_BEFORE,
    OUTPUT,
    QK_NORM,
    QKV,
    ROTARY_HEADS,
    Family,
)
from edgemerge.formats.gemma_families import GEMMA_VARIANTS, GEMMAS

__all__ = [
    "FAMILIES",
    "GLOBAL",
    "KINDS_OF_MODEL",
    "ROTARY_HEADS",
    "Family",
    "column_names",
    "expert_name",
    "gguf_name",
    "half_names",
    "hf_name",
    "is_ignored",
    "layer_index",
    "split_layer",
    "text_name",
]


_QKV_BIAS = {
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
}
_NORMS_AFTER = {
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
}
_NORMS_AROUND = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    **_NORMS_AFTER,
}
_OTHER_BIAS = {
    "attn_output.bias": "self_attn.o_proj.bias",
    "ffn_gate.bias": "mlp.gate_proj.bias",
    "ffn_up.bias": "mlp.up_proj.bias",
    "ffn_down.bias": "mlp.down_proj.bias",
}
_LLAMA = {**NORMS_BEFORE, **QKV, **_QKV_BIAS, **OUTPUT, **FFN, **_OTHER_BIAS}
_OLMO = {**_NORMS_AFTER, **QKV, **QK_NORM, **OUTPUT, **FFN}
_GEMMA3 = {**_NORMS_AROUND, **QKV, **QK_NORM, **OUTPUT, **FFN}

_LFM2_ATTENTION = {
    **QKV,
    "attn_q_norm.weight": "self_attn.q_layernorm.weight",
    "attn_k_norm.weight": "self_attn.k_layernorm.weight",
    "attn_output.weight": "self_attn.out_proj.weight",
}
_LFM2_CONV = {
    "shortconv.conv.weight": "conv.conv.weight",
    "shortconv.in_proj.weight": "conv.in_proj.weight",
    "shortconv.out_proj.weight": "conv.out_proj.weight",
}
_LFM2_REST = {
    "attn_norm.weight": "operator_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "ffn_gate.weight": "feed_forward.w1.weight",
    "ffn_down.weight": "feed_forward.w2.weight",
    "ffn_up.weight": "feed_forward.w3.weight",
}
_LFM2_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "token_embd_norm.weight": "model.embedding_norm.weight",  # of the output, whatever its name
    "output.weight": "lm_head.weight",
}
_LFM2_ONLY = {
    **dict.fromkeys(_LFM2_ATTENTION, "full_attention"),
    **dict.fromkeys(_LFM2_CONV, "conv"),
}

# model_type of config.json -> what edgemerge reads of such a directory
FAMILIES: dict[str, Family] = {
    "llama": Family("llama", _LLAMA, rotates_pairs=True),
    "mistral": Family("llama", _LLAMA, rotates_pairs=True),
    "ministral3": Family("mistral3", {**NORMS_BEFORE, **QKV, **OUTPUT, **FFN}, rotates_pairs=True),
    "mixtral": Family(
        "llama",
        {
            **NORMS_BEFORE,
            **QKV,
            **OUTPUT,
            "ffn_gate_inp.weight": "block_sparse_moe.gate.weight",
        },
        experts={
            "ffn_gate_exps.weight": "block_sparse_moe.experts.{}.w1.weight",
            "ffn_down_exps.weight": "block_sparse_moe.experts.{}.w2.weight",
            "ffn_up_exps.weight": "block_sparse_moe.experts.{}.w3.weight",
        },
        rotates_pairs=True,
    ),
    "qwen2": Family("qwen2", {**NORMS_BEFORE, **QKV, **_QKV_BIAS, **OUTPUT, **FFN}, is_biased=True),
    "qwen3": Family("qwen3", {**NORMS_BEFORE, **QKV, **QK_NORM, **OUTPUT, **FFN}),
    "qwen3_moe": Family(
        "qwen3moe",
        {
            **NORMS_BEFORE,
            **QKV,
            **QK_NORM,
            **OUTPUT,
            "ffn_gate_inp.weight": "mlp.gate.weight",
        },
        experts={
            "ffn_down_exps.weight": "mlp.experts.{}.down_proj.weight",
            "ffn_gate_exps.weight": "mlp.experts.{}.gate_proj.weight",
            "ffn_up_exps.weight": "mlp.experts.{}.up_proj.weight",
        },
    ),
    **DELTA_NETS,
    "gemma2": Family("gemma2", {**_NORMS_AROUND, **QKV, **OUTPUT, **FFN}, norm_offset=1.0),
    "gemma3_text": Family("gemma3", _GEMMA3, norm_offset=1.0),
    **GEMMAS,
    "phi3": Family(
        "phi3",
        {
            **NORMS_BEFORE,
            "attn_qkv.weight": "self_attn.qkv_proj.weight",
            **OUTPUT,
            "ffn_up.weight": "mlp.gate_up_proj.weight",
            "ffn_down.weight": "mlp.down_proj.weight",
        },
    ),
    "granite": Family("granite", _LLAMA, rotates_pairs=True),
    "lfm2": Family(
        "lfm2",
        {**_LFM2_ATTENTION, **_LFM2_CONV, **_LFM2_REST},
        outside=_LFM2_OUTSIDE,
        only=_LFM2_ONLY,
    ),
    **COMPOSITES,
    "olmo2": Family("olmo2", _OLMO),
    "olmo3": Family("olmo2", _OLMO),
    "smollm3": Family("smollm3", {**NORMS_BEFORE, **QKV, **OUTPUT, **FFN}, rotates_pairs=True),
}

# The same, and what a model type may be besides
KINDS_OF_MODEL: dict[str, Family] = {**FAMILIES, **VARIANTS, **GEMMA_VARIANTS}

# What GGUF calls alike in most other architectures, and its usual Hugging Face module.
_GENERIC_BLOCK: dict[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OVERRIDES: dict[str, dict[str, str]] = {
    "phi2": {"attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"},
    "starcoder2": {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
}
_GENERIC_GLOBAL: dict[str, str] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_PHI2_GLOBAL = {"output_norm": "model.final_layernorm"}

_HF_BLOCK = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,5})\.(.+)")
_GGUF_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)")
_NUMBER = re.compile(r"(?<=\.experts\.)(0|[1-9][0-9]{0,5})(?=\.)")
# What Hugging Face stores but inference does not use: the rotation's frequencies, masks and positions of
# old checkpoints, scales of an 8-bit cache, heads of other tasks, and layers that guess further tokens.
_IGNORED = re.compile(
    r"(.+\.)?(rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)|masked_bias|position_ids"
    r"|attn_mask|causal_mask|self_attn\.(bias|[kv]_scale))"
    r"|(model\.)?(v_head|value_head|score|reward_head|classifier|qa_outputs|mtp)\..+"
)


def _invert(table: Mapping[str, str]) -> dict[str, str]:
    return {hf: gguf for gguf, hf in table.items()}


_FROM_HF_GLOBAL = {name: _invert(family.outside) for name, family in KINDS_OF_MODEL.items()}
_FROM_HF_BLOCK = {name: _invert(family.block) for name, family in KINDS_OF_MODEL.items()}
_FROM_HF_EXPERT = {name: _invert(family.experts) for name, family in KINDS_OF_MODEL.items()}


def _names_by_architecture() -> dict[str, dict[str, str]]:
    """GGUF architecture -> its layers' tensors, those of all model types together."""
    tables: dict[str, dict[str, str]] = {}
    for family in KINDS_OF_MODEL.values():
        stacks = {gguf: hf.replace(".{}", "") for gguf, hf in family.experts.items()}
        stacks |= {gguf: hf for hf, parts in _parts(family).items() for gguf in parts}
        table = tables.setdefault(family.architecture, {})
        table |= {**family.block, **stacks, **table}  # the first family's names count
    return tables


def _parts(family: Family) -> Mapping[str, tuple[str, ...]]:
    """Hugging Face name of what is stored as one -> GGUF names of its parts."""
    return {**family.halves, **family.columns}


_TO_HF_BLOCK = _names_by_architecture()
_TO_HF_GLOBAL = {family.architecture: family.outside for family in KINDS_OF_MODEL.values()}


def gguf_name(kind: str, hf_name: str) -> str | None:
    """Return the GGUF name of a Hugging Face tensor; None if it has none of its own.

    `kind` is a key of `KINDS_OF_MODEL`, here and below.
    """
    if match := _HF_BLOCK.fullmatch(hf_name):
        stem = _FROM_HF_BLOCK[kind].get(match[2])
        return f"blk.{match[1]}.{stem}" if stem is not None else None
    return _FROM_HF_GLOBAL[kind].get(hf_name)


def split_layer(hf_name: str) -> tuple[int | None, str]:
    """Return the layer of a Hugging Face tensor, and its name within it; None and all of it elsewhere."""
    match = _HF_BLOCK.fullmatch(hf_name)
    return (int(match[1]), match[2]) if match else (None, hf_name)


def half_names(kind: str, hf_name: str) -> tuple[str, str] | None:
    """Return the GGUF names of two matrices that are stored as one; None for any other tensor."""
    match = _HF_BLOCK.fullmatch(hf_name)
    stems = KINDS_OF_MODEL[kind].halves.get(match[2]) if match else None
    if match is None or stems is None:
        return None
    return f"blk.{match[1]}.{stems[0]}", f"blk.{match[1]}.{stems[1]}"


def column_names(kind: str, hf_name: str) -> tuple[str, ...]:
    """Return the GGUF names that a stack's columns are dealt out to; none for any other tensor."""
    match = _HF_BLOCK.fullmatch(hf_name)
    stems = KINDS_OF_MODEL[kind].columns.get(match[2], ()) if match else ()
    return tuple(f"blk.{match[1]}.{stem}" for stem in stems) if match else ()


def expert_name(kind: str, hf_name: str) -> tuple[str, int] | None:
    """Return the GGUF tensor that stacks an expert's matrix, and the expert's number.

    None for a tensor that belongs to no expert.
    """
    match = _HF_BLOCK.fullmatch(hf_name)
    number = _NUMBER.search(match[2]) if match else None
    if match is None or number is None:
        return None
    stem = _FROM_HF_EXPERT[kind].get(_NUMBER.sub("{}", match[2]))
    return (f"blk.{match[1]}.{stem}", int(number[0])) if stem is not None else None


def hf_name(architecture: str, gguf_name: str) -> str | None:
    """Return the Hugging Face name of a GGUF tensor, which is what mergekit's filters look at.

    Exact for the architectures of `FAMILIES`, but that a stack of experts has no number; for others
    that follow the same naming scheme the usual name, and None for a tensor that it does not know.
    """
    block = _GGUF_BLOCK.fullmatch(gguf_name)
    prefix = f"model.layers.{block[1]}." if block else ""
    name = block[2] if block else gguf_name
    if architecture in _TO_HF_BLOCK:
        found = (_TO_HF_BLOCK if block else _TO_HF_GLOBAL)[architecture].get(name)
        return prefix + found if found is not None else None
    stem, _, suffix = name.rpartition(".")
    if suffix not in ("weight", "bias"):
        return None
    if block:
        table = _GENERIC_BLOCK | _OVERRIDES.get(architecture, {})
    else:
        table = _GENERIC_GLOBAL | (_PHI2_GLOBAL if architecture == "phi2" else {})
    module = table.get(stem)
    return f"{prefix}{module}.{suffix}" if module is not None else None


def layer_index(gguf_name: str) -> int | None:
    """Return N of `blk.N.…`; None for a tensor that belongs to no layer."""
    match = _GGUF_BLOCK.fullmatch(gguf_name)
    return int(match[1]) if match else None


def is_ignored(hf_name: str) -> bool:
    """Tell whether a Hugging Face tensor is dropped: it can be computed, or belongs to another task."""
    return _IGNORED.fullmatch(hf_name) is not None


def text_name(hf_name: str) -> str | None:
    """Return the name that a tensor of a model with a vision tower has in the text model alone.

    None for a tensor of the tower. `TextModel.filter_tensors` of llama.cpp's conversion/base.py.
    """
    if any(
        part in hf_name for part in ("vision_tower.", "vision_model.", "multi_modal_projector.")
    ):
        return None
    return hf_name.replace("language_model.", "")
