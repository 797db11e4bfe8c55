"""What config.json means in each family of models, and what llama.cpp wants to know of it.

The keys, their types and their order are those of llama.cpp's conversion/*.py, the defaults those
of transformers' configuration classes. A model that asks for arithmetic which llama.cpp does not
have in its family is refused by the name of the key. Not so for the sliding window of Mistral and
Qwen, which neither llama.cpp nor its converter knows: within the window the models are the same.
"""

from __future__ import annotations

from edgemerge.formats.hub.delta_net import DELTA_NET_READERS
from edgemerge.formats.hub.falcon_h1 import FALCONS
from edgemerge.formats.hub.gemma3n import GEMMA3N
from edgemerge.formats.hub.gemma4 import GEMMA4
from edgemerge.formats.hub.gpt_oss import GPT_OSS
from edgemerge.formats.hub.granite import GRANITES
from edgemerge.formats.hub.llama4 import LLAMA4
from edgemerge.formats.hub.own_keys import (
    gemma2_keys,
    gemma3_keys,
    lfm2_keys,
    lfm2_layers,
    lfm2_width,
    ministral3_keys,
    olmo3_keys,
    phi3_keys,
    qwen3_moe_keys,
    smollm3_keys,
)
from edgemerge.formats.hub.reader import (
    HEADS,
    LENGTHS,
    LINEAR_YARN,
    LLAMA,
    LLAMA_ROPES,
    TEXT,
    Reader,
)

__all__ = ["READERS"]

# model_type of config.json -> how the rest of it is read
READERS: dict[str, Reader] = {
    "llama": Reader(
        ("LlamaForCausalLM", "LLaMAForCausalLM"),
        LLAMA,
        LLAMA_ROPES,
        {"max_position_embeddings": 2048},
        states_head_dim=True,
    ),
    "mistral": Reader(
        ("MistralForCausalLM",),
        LLAMA,
        LLAMA_ROPES,
        {"max_position_embeddings": 131072, "num_key_value_heads": 8},
        states_head_dim=True,
    ),
    **LLAMA4,
    **GPT_OSS,
    "ministral3": Reader(
        ("Ministral3ForCausalLM", "Mistral3ForConditionalGeneration"),
        (*LLAMA, "rope.scaling.yarn_log_multiplier", "attention.temperature_scale"),
        LINEAR_YARN,
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
        LLAMA,
        LLAMA_ROPES,
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
        (*TEXT, *LENGTHS),
        LINEAR_YARN,
        {"max_position_embeddings": 32768, "num_key_value_heads": 32},
        splits_embedding=True,
    ),
    "qwen3": Reader(
        ("Qwen3ForCausalLM",),
        (*TEXT, *LENGTHS),
        LINEAR_YARN,
        {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
        states_head_dim=True,
    ),
    "qwen3_moe": Reader(
        ("Qwen3MoeForCausalLM",),
        (*TEXT, *LENGTHS, "expert_feed_forward_length"),
        LINEAR_YARN,
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
            *HEADS,
            "attention.layer_norm_rms_epsilon",
            *LENGTHS,
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
        (*TEXT, *LENGTHS, "final_logit_softcapping", "attention.sliding_window"),
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
    **GEMMA3N,
    **GEMMA4,
    "phi3": Reader(
        ("Phi3ForCausalLM",),
        (
            "rope.scaling.attn_factor",
            "context_length",
            "rope.scaling.original_context_length",
            "embedding_length",
            "feed_forward_length",
            "block_count",
            *HEADS,
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
    **GRANITES,
    **FALCONS,
    "lfm2": Reader(
        ("Lfm2ForCausalLM", "LFM2ForCausalLM"),
        (*TEXT, "vocab_size", "shortconv.l_cache"),
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
        (*TEXT, *LENGTHS),
        LINEAR_YARN,
        {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
        splits_embedding=True,
        tied=False,
    ),
    "olmo3": Reader(
        ("Olmo3ForCausalLM",),
        (
            *TEXT,
            *LENGTHS,
            "attention.sliding_window",
            "attention.sliding_window_pattern",
        ),
        LINEAR_YARN,
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
        LLAMA,
        LINEAR_YARN,
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
