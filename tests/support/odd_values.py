"""Values that an odd header may have: types, names, numbers, keys."""

from __future__ import annotations

import math

KINDS = ["u32", "i32", "u64", "f32", "bool", "str", "[u32]", "[i32]", "[f32]"]
SPECIAL = ["bos", "eos", "eot", "unknown", "seperator", "padding", "mask"]
MODELS = [
    "none",
    "no_vocab",
    "bert",
    "t5",
    "rwkv",
    "plamo2",
    "whitespace",
    "hybriddna",
    "test",
    "gemma4",
]
MODELS += ["gpt2", "llama", "made-up"]
PRES = [
    "llama-bpe",
    "gpt-2",
    "qwen2",
    "gemma4",
    "glm4",
    "chatglm-bpe",
    "tekken",
    "default",
    "made-up",
    "",
]
PRES += [
    "jina-v1-en",
    "kimi-k2",
    "whitespace",
    "roberta-bpe",
    "falcon",
    "bloom",
    "gpt-4o",
    "smollm",
]
ARCHITECTURES = [
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "phi2",
    "phi3",
    "granite",
    "olmo2",
    "falcon",
]
ARCHITECTURES += [
    "mamba",
    "t5",
    "t5encoder",
    "bert",
    "nomic-bert",
    "gpt2",
    "deci",
    "mistral3",
    "qwen3moe",
]
ARCHITECTURES += [
    "starcoder2",
    "command-r",
    "dream",
    "llada",
    "smollm3",
    "eagle3",
    "clip",
    "made-up",
]
DTYPES = [
    "F16",
    "BF16",
    "F64",
    "Q8_0",
    "Q4_0",
    "Q8_1",
    "I8",
    "I16",
    "I32",
    "I64",
    "IQ4_NL",
    "MXFP4",
]
NUMBERS = [0, 1, 2, 3, 5, 7, 16, 31, 64, 257, 513, 1025, 65535, 2**31 - 1, 2**32 - 1]
FLOATS = [0.0, -1.0, 1e-30, 1e30, math.inf, -math.inf, math.nan]
# Keys of an architecture that a small model need not have, by the type of their value.
EXTRA_U32 = """
nextn_predict_layers expert_count expert_used_count expert_group_count expert_group_used_count
attention.key_length attention.value_length attention.key_length_swa attention.sliding_window
attention.sliding_window_pattern rope.dimension_count rope.scaling.original_context_length pooling_type
embedding_length_out vocab_size
"""
EXTRA_F32 = """
attention.layer_norm_epsilon attention.scale attention.max_alibi_bias attention.clamp_kqv
attn_logit_softcapping final_logit_softcapping rope.freq_base rope.scaling.factor rope.scaling.attn_factor
logit_scale residual_scale
"""
EXTRA = dict.fromkeys(EXTRA_U32.split(), "u32") | dict.fromkeys(EXTRA_F32.split(), "f32")
EXTRA |= {"use_parallel_residual": "bool", "attention.causal": "bool"}
