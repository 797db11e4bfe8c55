"""What config.json means in each family of models, and what llama.cpp wants to know of it.

The keys, their types and their order are those of llama.cpp's conversion/*.py, the defaults those
of transformers' configuration classes. A model that asks for arithmetic which llama.cpp does not
have in its family is refused by the name of the key. Not so for the sliding window of Mistral and
Qwen, which neither llama.cpp nor its converter knows: within the window the models are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.formats.hub.checker import Checker

__all__ = ["READERS", "Reader", "Shapes"]


@dataclass(frozen=True, slots=True)
class Shapes:
    """The counts that every model has."""

    n_layers: int
    n_embd: int
    n_head: int
    head_dim: int


def _no_keys(check: Checker, shapes: Shapes) -> dict[str, bytes]:
    return {}


@dataclass(frozen=True, slots=True)
class Reader:
    """How the config.json of one model type is read."""

    classes: tuple[str, ...]  # of `architectures`
    keys: tuple[str, ...]  # of GGUF, without the architecture's name, in the converter's order
    ropes: tuple[str, ...]  # kinds of rope scaling that llama.cpp computes for it
    defaults: Mapping[str, Any] = field(default_factory=dict)
    activation: tuple[str, str] = ("hidden_act", "silu")
    own_keys: Callable[[Checker, Shapes], dict[str, bytes]] = _no_keys
    states_head_dim: bool = False  # also where config.json does not
    splits_embedding: bool = False  # llama.cpp takes head_dim to be n_embd / n_head
    tied: bool | None = None  # None: as the model likes
    # Keys: the count of experts under the names it has had, how many work at a time, their width
    experts: tuple[tuple[str, ...], str, str] | None = None


_ROPE = (
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.attn_factor",
    "rope.freq_base",
    "rope.freq_base_swa",
)
_HEADS = ("attention.head_count", "attention.head_count_kv")
_LENGTHS = ("attention.key_length", "attention.value_length")
_TEXT = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    *_HEADS,
    *_ROPE,
    "attention.layer_norm_rms_epsilon",
    "expert_count",
    "expert_used_count",
)
_LLAMA = (*_TEXT, *_LENGTHS, "vocab_size", "rope.dimension_count")
_LINEAR_YARN = ("default", "linear", "yarn")
_LLAMA_ROPES = ("default", "linear", "llama3", "yarn")


def _scales_of_granite(check: Checker, shapes: Shapes) -> dict[str, bytes]:
    names = {
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    }
    return {key: encode_value(check.number(name, 1.0), "f32") for key, name in names.items()}


def _gemma2(check: Checker, shapes: Shapes) -> dict[str, bytes]:
    _check_query_scale(check, shapes, n_layers_of_27b=46)
    _check_layer_types(check, _windows(shapes.n_layers, 2))
    return {
        "attn_logit_softcapping": encode_value(check.number("attn_logit_softcapping"), "f32"),
        "final_logit_softcapping": encode_value(check.number("final_logit_softcapping"), "f32"),
        "attention.sliding_window": encode_value(check.count("sliding_window"), "u32"),
    }


def _gemma3(check: Checker, shapes: Shapes) -> dict[str, bytes]:
    _check_query_scale(check, shapes, n_layers_of_27b=62)
    if check.flag("use_bidirectional_attention"):
        raise check.unlike("use_bidirectional_attention", True, "causal attention")
    if (cap := check.get("attn_logit_softcapping")) is not None:
        raise check.unlike("attn_logit_softcapping", cap, "none")
    keys = {}
    if check.get("final_logit_softcapping") is not None:
        cap = check.number("final_logit_softcapping")
        keys["final_logit_softcapping"] = encode_value(cap, "f32")
    types = check.get("layer_types")
    period = check.get("sliding_window_pattern") or check.get("_sliding_window_pattern")
    full = _windows(shapes.n_layers, 1)
    if types == full or (types is None and period == 1):
        return keys
    if types is None and period not in (None, 6):
        raise check.unlike("sliding_window_pattern", period, "6 or 1")
    _check_layer_types(check, _windows(shapes.n_layers, 6))
    window = encode_value(check.count("sliding_window"), "u32")
    return keys | {"attention.sliding_window": window}


def _windows(n_layers: int, period: int) -> list[str]:
    """Kinds of attention where every layer of number `period` sees the whole text."""
    return ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(n_layers)]


def _check_layer_types(check: Checker, wanted: list[str]) -> None:
    if check.get("layer_types") not in (None, wanted):
        period = [*wanted, "full_attention"].index("full_attention") + 1
        raise check.unlike(
            "layer_types", check.get("layer_types"), f"full attention in every layer {period}"
        )


def _check_query_scale(check: Checker, shapes: Shapes, n_layers_of_27b: int) -> None:
    """llama.cpp knows the scale of Gemma's queries by the model's size."""
    is_27b = shapes.n_layers == n_layers_of_27b
    wanted = shapes.n_embd // shapes.n_head if is_27b else shapes.head_dim
    scalar = check.number("query_pre_attn_scalar")
    if scalar != wanted:
        raise check.unlike("query_pre_attn_scalar", scalar, str(wanted))


def _phi3(check: Checker, shapes: Shapes) -> dict[str, bytes]:
    # llama.cpp computes Phi-3 without a window; 0 tells it that there is none.
    window = check.get("sliding_window")
    stated = check.count("sliding_window") if window else 0
    return {"attention.sliding_window": encode_value(stated, "u32")}


def _qwen3_moe(check: Checker, shapes: Shapes) -> dict[str, bytes]:
    if not check.flag("norm_topk_prob"):
        raise check.unlike("norm_topk_prob", False, "true")
    if (step := check.count("decoder_sparse_step")) != 1:
        raise check.unlike("decoder_sparse_step", step, "experts in every layer")
    if layers := check.get("mlp_only_layers"):
        raise check.unlike("mlp_only_layers", layers, "experts in every layer")
    width = check.count("moe_intermediate_size")
    return {"expert_feed_forward_length": encode_value(width, "u32")}


def _smollm3(check: Checker, shapes: Shapes) -> dict[str, bytes]:
    """llama.cpp leaves out the rotation in every fourth layer, whatever the model says."""
    wanted = [int((i + 1) % 4 != 0) for i in range(shapes.n_layers)]
    period = check.count("no_rope_layer_interval")
    turned = check.get("no_rope_layers")
    if turned is None:
        turned = [int((i + 1) % period != 0) for i in range(shapes.n_layers)]
    if turned != wanted:
        raise check.unlike("no_rope_layers", turned, "every fourth layer without rotation")
    return {}


# model_type of config.json -> how the rest of it is read
READERS: dict[str, Reader] = {
    "llama": Reader(
        ("LlamaForCausalLM", "LLaMAForCausalLM"),
        _LLAMA,
        _LLAMA_ROPES,
        {"max_position_embeddings": 2048},
        states_head_dim=True,
    ),
    "mistral": Reader(
        ("MistralForCausalLM",),
        _LLAMA,
        _LLAMA_ROPES,
        {"max_position_embeddings": 131072, "num_key_value_heads": 8},
        states_head_dim=True,
    ),
    "mixtral": Reader(
        ("MixtralForCausalLM",),
        _LLAMA,
        _LLAMA_ROPES,
        {
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
        },
        experts=(("num_local_experts",), "num_experts_per_tok", "intermediate_size"),
    ),
    "qwen2": Reader(
        ("Qwen2ForCausalLM",),
        (*_TEXT, *_LENGTHS),
        _LINEAR_YARN,
        {"max_position_embeddings": 32768, "num_key_value_heads": 32},
        splits_embedding=True,
    ),
    "qwen3": Reader(
        ("Qwen3ForCausalLM",),
        (*_TEXT, *_LENGTHS),
        _LINEAR_YARN,
        {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
        states_head_dim=True,
    ),
    "qwen3_moe": Reader(
        ("Qwen3MoeForCausalLM",),
        (*_TEXT, *_LENGTHS, "expert_feed_forward_length"),
        _LINEAR_YARN,
        {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "decoder_sparse_step": 1,
        },
        own_keys=_qwen3_moe,
        experts=(
            ("num_experts", "num_local_experts"),
            "num_experts_per_tok",
            "moe_intermediate_size",
        ),
    ),
    "gemma2": Reader(
        ("Gemma2ForCausalLM",),
        (
            "context_length",
            "embedding_length",
            "block_count",
            "feed_forward_length",
            *_HEADS,
            "attention.layer_norm_rms_epsilon",
            *_LENGTHS,
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "attention.sliding_window",
        ),
        ("default",),
        {
            "max_position_embeddings": 8192,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "tie_word_embeddings": True,
            "hidden_activation": "gelu_pytorch_tanh",
        },
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        own_keys=_gemma2,
        states_head_dim=True,
        tied=True,
    ),
    "gemma3_text": Reader(
        ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        (*_TEXT, *_LENGTHS, "final_logit_softcapping", "attention.sliding_window"),
        ("default", "linear"),
        {
            "max_position_embeddings": 131072,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "vocab_size": 262208,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "rope_theta": 1e6,
            "rope_local_base_freq": 10000.0,
            "tie_word_embeddings": True,
            "hidden_activation": "gelu_pytorch_tanh",
        },
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        own_keys=_gemma3,
        states_head_dim=True,
    ),
    "phi3": Reader(
        ("Phi3ForCausalLM",),
        (
            "rope.scaling.attn_factor",
            "context_length",
            "rope.scaling.original_context_length",
            "embedding_length",
            "feed_forward_length",
            "block_count",
            *_HEADS,
            "attention.layer_norm_rms_epsilon",
            "rope.dimension_count",
            "rope.freq_base",
            "attention.sliding_window",
        ),
        ("default", "longrope"),
        {
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        own_keys=_phi3,
        splits_embedding=True,
    ),
    "granite": Reader(
        ("GraniteForCausalLM",),
        (
            *_TEXT,
            "vocab_size",
            "rope.dimension_count",
            "attention.scale",
            "embedding_scale",
            "residual_scale",
            "logit_scale",
        ),
        _LINEAR_YARN,
        {"max_position_embeddings": 2048},
        own_keys=_scales_of_granite,
        splits_embedding=True,
    ),
    "olmo2": Reader(
        ("Olmo2ForCausalLM",),
        (*_TEXT, *_LENGTHS),
        _LINEAR_YARN,
        {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
        splits_embedding=True,
        tied=False,
    ),
    "smollm3": Reader(
        ("SmolLM3ForCausalLM",),
        _LLAMA,
        _LINEAR_YARN,
        {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "no_rope_layer_interval": 4,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
        },
        own_keys=_smollm3,
    ),
}
