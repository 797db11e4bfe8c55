"""What a row of the table of architectures has, and the names of tensors that most rows share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["FFN", "GLOBAL", "NORMS_BEFORE", "OUTPUT", "QKV", "QK_NORM", "ROTARY_HEADS", "Family"]


@dataclass(frozen=True, slots=True)
class Family:
    """One `model_type` of config.json: its GGUF architecture, and the tensors of a layer."""

    architecture: str  # general.architecture
    block: Mapping[str, str]  # GGUF name -> Hugging Face name
    # GGUF name -> name of one expert, {} its number; in the order in which the converter stacks them
    experts: Mapping[str, str] = field(default_factory=dict)
    # Hugging Face name of two matrices, or stacks of them, one above the other -> their GGUF names
    halves: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    # Name of a stack of matrices that are stored transposed, or of their biases -> the GGUF names that
    # its columns are dealt out to: one after the other, or in turn
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    deals_in_turn: bool = False
    outside: Mapping[str, str] = field(default_factory=lambda: GLOBAL)  # as `block`, of no layer
    # GGUF name -> the kind of layer (`layer_types` of config.json) that alone has such a tensor; or two,
    # with | between them
    only: Mapping[str, str] = field(default_factory=dict)
    rotates_pairs: bool = False  # GGUF keeps the rows of q and k in another order, see ROTARY_HEADS
    norm_offset: float = 0.0  # stored norms are this much below what a vector is multiplied by
    is_biased: bool = False  # whether q, k and v always have biases
    towers: tuple[str, ...] = ()  # in names of tensors that see or hear, not read


GLOBAL: dict[str, str] = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

# Tensors whose rows GGUF keeps in the order of ggml's rotation of consecutive pairs, and the head
# count that cuts them: `LlamaModel.permute` of llama.cpp's conversion/llama.py.
ROTARY_HEADS: dict[str, str] = {
    "attn_q.weight": "n_head",
    "attn_q.bias": "n_head",
    "attn_k.weight": "n_kv_head",
    "attn_k.bias": "n_kv_head",
}

QKV = {
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
}
QK_NORM = {
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
}
OUTPUT = {"attn_output.weight": "self_attn.o_proj.weight"}
FFN = {
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
NORMS_BEFORE = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
