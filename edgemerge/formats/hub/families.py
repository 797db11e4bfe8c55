"""What config.json means in each family of models, and what llama.cpp wants to know of it.

The keys, their types and their order are those of llama.cpp's conversion/*.py, the defaults those
of transformers' configuration classes. A model that asks for arithmetic which llama.cpp does not
have in its family is refused by the name of the key. Not so for the sliding window of Mistral and
Qwen, which neither llama.cpp nor its converter knows: within the window the models are the same.
"""

from __future__ import annotations

from edgemerge.formats.hub.delta_net import DELTA_NET_READERS
from edgemerge.formats.hub.own_keys import (
    gemma2_keys,
    gemma3_keys,
    granite4_keys,
    lfm2_keys,
    lfm2_layers,
    lfm2_width,
    ministral3_keys,
    olmo3_keys,
    phi3_keys,
    qwen3_moe_keys,
    scales_of_granite,
    smollm3_keys,
)
from edgemerge.formats.hub.reader import Reader

__all__ = ["READERS"]


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
_GRANITE = (
    *_TEXT,
    "vocab_size",
    "rope.dimension_count",
    "attention.scale",
    "embedding_scale",
    "residual_scale",
    "logit_scale",
)
_LINEAR_YARN = ("default", "linear", "yarn")
_LLAMA_ROPES = ("default", "linear", "llama3", "yarn")


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
    "ministral3": Reader(
        ("Ministral3ForCausalLM", "Mistral3ForConditionalGeneration"),
        (*_LLAMA, "rope.scaling.yarn_log_multiplier", "attention.temperature_scale"),
        _LINEAR_YARN,
        {
            "max_position_embeddings": 262144,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
        },
        own_keys=ministral3_keys,
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
        own_keys=qwen3_moe_keys,
        experts=(
            ("num_experts", "num_local_experts"),
            "num_experts_per_tok",
            "moe_intermediate_size",
        ),
    ),
    **DELTA_NET_READERS,
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
        own_keys=gemma2_keys,
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
        own_keys=gemma3_keys,
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
        own_keys=phi3_keys,
        splits_embedding=True,
    ),
    "granite": Reader(
        ("GraniteForCausalLM",),
        _GRANITE,
        _LINEAR_YARN,
        {"max_position_embeddings": 2048},
        own_keys=scales_of_granite,
        splits_embedding=True,
    ),
    "granitemoehybrid": Reader(
        ("GraniteMoeHybridForCausalLM",),
        (
            *_GRANITE,
            "expert_shared_feed_forward_length",
            "ssm.conv_kernel",
            "ssm.state_size",
            "ssm.group_count",
            "ssm.inner_size",
            "ssm.time_step_rank",
            "rope.scaling.finetuned",
        ),
        _LINEAR_YARN,
        {
            "max_position_embeddings": 2048,
            "num_local_experts": 8,
            "shared_intermediate_size": 1024,
            "mamba_d_conv": 4,
            "mamba_d_state": 256,
            "mamba_n_groups": 1,
            "mamba_expand": 2,
            "mamba_n_heads": 128,
        },
        own_keys=granite4_keys,
        splits_embedding=True,
    ),
    "lfm2": Reader(
        ("Lfm2ForCausalLM", "LFM2ForCausalLM"),
        (*_TEXT, "vocab_size", "shortconv.l_cache"),
        ("default",),
        {
            "max_position_embeddings": 128000,
            "num_key_value_heads": 8,
            "norm_eps": 1e-5,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
            "conv_L_cache": 3,
            "block_multiple_of": 256,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": True,
        },
        own_keys=lfm2_keys,
        layer_kinds=lfm2_layers,
        width=lfm2_width,
        eps_key="norm_eps",
        tie_keys=("tie_embedding", "tie_word_embeddings"),
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
    "olmo3": Reader(
        ("Olmo3ForCausalLM",),
        (
            *_TEXT,
            *_LENGTHS,
            "attention.sliding_window",
            "attention.sliding_window_pattern",
        ),
        _LINEAR_YARN,
        {
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "sliding_window": 4096,
        },
        own_keys=olmo3_keys,
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
        own_keys=smollm3_keys,
    ),
}
