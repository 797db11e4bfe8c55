"""Tables: tensor names of Hugging Face and of GGUF, and the rotary row order, per architecture.

Names on the left are GGUF's without `blk.N.`, on the right Hugging Face's without
`model.layers.N.`; the suffix (`.weight`, `.bias`) is the same in both. GGUF's side is
`MODEL_TENSORS` of gguf-py/gguf/constants.py, the other its tensor_mapping.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = [
    "LLAMA_BLOCK",
    "LLAMA_GLOBAL",
    "MODEL_TYPES",
    "ROTARY_HEADS",
    "gguf_name",
    "hf_name",
    "is_ignored",
    "layer_index",
]

# model_type of config.json -> general.architecture of GGUF, where edgemerge reads directories.
MODEL_TYPES: dict[str, str] = {"llama": "llama", "mistral": "llama"}

LLAMA_GLOBAL: dict[str, str] = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

LLAMA_BLOCK: dict[str, str] = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_output.bias": "self_attn.o_proj.bias",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_gate.bias": "mlp.gate_proj.bias",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_up.bias": "mlp.up_proj.bias",
    "ffn_down.weight": "mlp.down_proj.weight",
    "ffn_down.bias": "mlp.down_proj.bias",
}

# Tensors whose rows GGUF keeps in the order of ggml's rotation of consecutive pairs, and the head
# count that cuts them: `LlamaModel.permute` of llama.cpp's conversion/llama.py.
ROTARY_HEADS: dict[str, str] = {
    "attn_q.weight": "n_head",
    "attn_q.bias": "n_head",
    "attn_k.weight": "n_kv_head",
    "attn_k.bias": "n_kv_head",
}

# What GGUF calls alike in most architectures, and its usual Hugging Face module.
_GENERIC_GLOBAL: dict[str, str] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
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
_GEMMA2_BLOCK = {"ffn_norm": "pre_feedforward_layernorm"}
_OVERRIDES: dict[str, dict[str, str]] = {
    "gemma2": _GEMMA2_BLOCK,
    "gemma3": _GEMMA2_BLOCK,
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
    "phi2": {"attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"},
    "starcoder2": {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
}
_PHI2_GLOBAL = {"output_norm": "model.final_layernorm"}

_HF_BLOCK = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,5})\.(.+)")
_GGUF_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)")
# What Hugging Face stores but nobody needs: old checkpoints carry the rotation's frequencies.
_IGNORED = re.compile(r"(.+\.)?rotary_emb\.inv_freq")


def _invert(table: Mapping[str, str]) -> dict[str, str]:
    return {hf: gguf for gguf, hf in table.items()}


_FROM_HF_GLOBAL = _invert(LLAMA_GLOBAL)
_FROM_HF_BLOCK = _invert(LLAMA_BLOCK)


def gguf_name(name: str) -> str | None:
    """Return the GGUF name of a Hugging Face Llama or Mistral tensor; None if it has none."""
    if match := _HF_BLOCK.fullmatch(name):
        stem = _FROM_HF_BLOCK.get(match[2])
        return f"blk.{match[1]}.{stem}" if stem is not None else None
    return _FROM_HF_GLOBAL.get(name)


def hf_name(architecture: str, gguf_name: str) -> str | None:
    """Return the Hugging Face name of a GGUF tensor, which is what mergekit's filters look at.

    Exact for architecture "llama"; for others that follow the same naming scheme the usual name,
    and None for a tensor that the scheme does not know.
    """
    block = _GGUF_BLOCK.fullmatch(gguf_name)
    prefix = f"model.layers.{block[1]}." if block else ""
    name = block[2] if block else gguf_name
    if architecture == "llama":
        found = (LLAMA_BLOCK if block else LLAMA_GLOBAL).get(name)
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
    """Tell whether a Hugging Face tensor is dropped: it can be computed from the configuration."""
    return _IGNORED.fullmatch(hf_name) is not None
