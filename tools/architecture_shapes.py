"""The models that make_architecture_fixtures.py makes: their shapes, tokenizers and variants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["PRE_TOKENIZERS", "SHAPES", "Shape"]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{{0}}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{{0}}|"
)
_REST_AND_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = _CASED.replace("{0}", "") + r"\p{N}|" + _REST_AND_SLASH
O200K = _CASED.replace("{0}", f"{_CONTRACTIONS}?") + r"\p{N}{1,3}|" + _REST_AND_SLASH
CL100K = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"


def _split(regex: str) -> Callable[[Any], list[Any]]:
    def steps(library: Any) -> list[Any]:
        from tokenizers import Regex

        return [
            library.Split(Regex(regex), behavior="isolated"),
            library.ByteLevel(add_prefix_space=False, use_regex=False),
        ]

    return steps


def _digits(library: Any) -> list[Any]:
    return [
        library.Digits(individual_digits=True),
        library.ByteLevel(add_prefix_space=False, use_regex=True),
    ]


# tokenizer.ggml.pre -> the pre-tokenizer of the families that it is for
PRE_TOKENIZERS: dict[str, Callable[[Any], list[Any]]] = {
    "qwen2": _split(QWEN2),
    "dbrx": _split(CL100K),
    "llama-bpe": _split(CL100K),
    "lfm2": _split(CL100K),
    "refact": _digits,
    "smollm": _digits,
    "smaug-bpe": _split(CL100K),
    "tekken": _split(TEKKEN),
    "gpt-4o": _split(O200K),
    "gpt-2": lambda library: [library.ByteLevel(add_prefix_space=False, use_regex=True)],
}

CHATML = (
    ("<|endoftext|>", True),
    ("<|im_start|>", True),
    ("<|im_end|>", True),
    ("<tool_x>", False),
)
GEMMA_TURNS = (("<start_of_turn>", True), ("<end_of_turn>", False), ("<unused7>", False))
PHI_TURNS = (("<|endoftext|>", True), ("<|user|>", False), ("<|end|>", True))

TINY = dict(
    hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
    num_hidden_layers=2, vocab_size=336, max_position_embeddings=128,
)  # fmt: skip
SPM = TINY | dict(vocab_size=384)  # SentencePiece needs all its bytes and letters
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
YARN_VARIANT = {"yarn": {"rope_parameters": YARN | {"rope_theta": 1e4}}}
LONGROPE = dict(
    rope_type="longrope", rope_theta=10000.0, partial_rotary_factor=1.0,
    long_factor=[1.0, 2.5, 4.0, 7.5], short_factor=[1.0, 1.05, 1.1, 1.25],
)  # fmt: skip

MINISTRAL = YARN | dict(
    rope_theta=1e6, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0,
    llama_4_scaling_beta=0.1,
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """One fixture."""

    model_type: str
    config: dict[str, Any]
    pre: str | None  # tokenizer.ggml.pre; None: SentencePiece
    dtype: str = "bf16"
    n_tokens: int = 330  # without the added ones
    added: tuple[tuple[str, bool], ...] = CHATML  # text, special
    has_bos: bool = False
    ignore_merges: bool = False
    nfc: bool = False
    with_json: bool = False  # tokenizer.json beside tokenizer.model
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)  # changes of config.json
    config_added: dict[str, Any] = field(default_factory=dict)
    config_removed: tuple[str, ...] = ()
    tokenizer_class: str = "PreTrainedTokenizerFast"


SHAPES: dict[str, Shape] = {
    "llama": Shape(
        "llama",
        TINY | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
        "llama-bpe",
        ignore_merges=True,
        has_bos=True,
        variants=YARN_VARIANT | {"llama3": {"rope_parameters": LLAMA3 | {"rope_theta": 5000.0}}},
    ),
    "mistral": Shape(
        "mistral",
        SPM | dict(head_dim=12, sliding_window=None),
        None,
        n_tokens=382,
        added=(("[INST]", True), ("[/INST]", True)),
    ),
    "qwen2": Shape(
        "qwen2",
        TINY | {"tie_word_embeddings": True},
        "qwen2",
        dtype="f16",
        nfc=True,
        variants={
            "linear": {
                "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e6}
            },
            "yarn": {"rope_parameters": YARN | {"rope_theta": 1e6}},
            "yarn_old_style": {
                "rope_parameters": None,
                "rope_theta": 1e6,
                "rope_scaling": {
                    "type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32,
                },
            },
        },
    ),
    "qwen3": Shape(
        "qwen3",
        TINY | {"head_dim": 16},
        "qwen2",
        nfc=True,
        variants=YARN_VARIANT
        | {
            "yarn_attention": {
                "rope_parameters": YARN | {"rope_theta": 1e4, "attention_factor": 0.9}
            },
        },
    ),
    "gemma2": Shape(
        "gemma2",
        SPM | dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=8,
                    attn_logit_softcapping=1.0, final_logit_softcapping=0.75),
        None,
        n_tokens=380,
        added=GEMMA_TURNS,
    ),
    "gemma3": Shape(
        "gemma3_text",
        SPM
        | dict(
            hidden_size=24,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            query_pre_attn_scalar=16,
            intermediate_size=24,
            sliding_window=8,
            num_hidden_layers=7,
        ),
        None,
        n_tokens=380,
        added=GEMMA_TURNS,
        with_json=True,
        variants={
            "linear": {
                "rope_parameters": {
                    "full_attention": {
                        "rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0,
                    },
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                },
            },
            "old_style": {
                "rope_parameters": None,
                "rope_theta": 500000.0,
                "rope_local_base_freq": 5000.0,
                "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            },
        },
    ),
    "phi3": Shape(
        "phi3",
        SPM | dict(pad_token_id=0, eos_token_id=2, bos_token_id=1),
        None,
        n_tokens=380,
        added=PHI_TURNS,
        variants={
            "long": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16},
            "short": {
                "rope_parameters": LONGROPE,
                "max_position_embeddings": 8192,
                "original_max_position_embeddings": 4096,
            },
            "partial": {"rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        },
    ),
    "mixtral": Shape(
        "mixtral",
        SPM | dict(intermediate_size=32, num_local_experts=4, num_experts_per_tok=2),
        None,
        n_tokens=382,
        added=(("[INST]", True), ("[/INST]", True)),
        variants={"llama3": {"rope_parameters": LLAMA3 | {"rope_theta": 5000.0}}},
    ),
    "qwen3_moe": Shape(
        "qwen3_moe",
        TINY | dict(head_dim=16, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2,
                    norm_topk_prob=True),
        "qwen2",
        nfc=True,
    ),
    "granite": Shape(
        "granite",
        TINY | dict(tie_word_embeddings=True, embedding_multiplier=3.0, logits_scaling=4.0,
                    residual_multiplier=0.5, attention_multiplier=0.25),
        "refact",
        variants=YARN_VARIANT,
    ),
    "olmo2": Shape(
        "olmo2",
        TINY | dict(hidden_size=16, num_attention_heads=2, num_key_value_heads=1,
                    pad_token_id=0, eos_token_id=2),
        "dbrx",
        dtype="f32",
        variants=YARN_VARIANT,
    ),
    "smollm3": Shape(
        "smollm3",
        TINY | dict(num_hidden_layers=4, pad_token_id=0, bos_token_id=None, eos_token_id=331),
        "llama-bpe",
        ignore_merges=True,
        has_bos=True,
        variants=YARN_VARIANT,
    ),
    "olmo3": Shape(
        "olmo3",
        TINY | dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1,
                    num_hidden_layers=4,
                    sliding_window=8, pad_token_id=0, eos_token_id=2),
        "dbrx",
        variants={
            "yarn": {"rope_parameters": {
                "full_attention": YARN | {"rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
            }},
            "old_style": {
                "rope_parameters": None, "rope_theta": 5e5, "rope_scaling": YARN,
                "layer_types": ["full_attention"] + 3 * ["sliding_attention"],
            },
        },
    ),
    "ministral3": Shape(
        "ministral3",
        TINY | dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1,
                    head_dim=12, pad_token_id=0, rope_parameters=MINISTRAL),
        "tekken",
        has_bos=True,
        variants={"other_scale": {"rope_parameters": MINISTRAL | {
            "mscale": 0.5, "mscale_all_dim": 0.8, "factor": 8.0}}},
    ),
    "phi4_mini": Shape(
        "phi3",
        TINY | dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1,
                    tie_word_embeddings=True, pad_token_id=0, bos_token_id=331, eos_token_id=331,
                    sliding_window=None, rope_parameters=dict(
                        rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.75)),
        "gpt-4o",
        tokenizer_class="GPT2Tokenizer",
        variants={"long": {
            "rope_parameters": LONGROPE | dict(
                partial_rotary_factor=0.75, long_factor=[1.0, 2.5, 7.5],
                short_factor=[1.0, 1.05, 1.25]),
            "original_max_position_embeddings": 16,
        }},
    ),
    "granite4": Shape(
        "granitemoehybrid",
        TINY | dict(hidden_size=16, intermediate_size=24, shared_intermediate_size=24,
                    num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
                    num_local_experts=0, num_experts_per_tok=0, position_embedding_type="rope",
                    layer_types=["full_attention"] * 2, mamba_n_heads=4, mamba_d_head=8,
                    mamba_d_state=8, embedding_multiplier=3.0, logits_scaling=4.0,
                    residual_multiplier=0.5, attention_multiplier=0.25),
        "dbrx",
        config_added={"layer_types": ["attention"] * 2},
    ),
    "lfm2": Shape(
        "lfm2",
        TINY | dict(hidden_size=16, intermediate_size=30, num_attention_heads=2, num_key_value_heads=1,
                    num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"],
                    block_multiple_of=8, tie_word_embeddings=True),
        "lfm2",
        ignore_merges=True,
        has_bos=True,
        variants={"theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}},
    ),
}  # fmt: skip
