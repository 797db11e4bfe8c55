"""config.json of a Llama or Mistral model: checked, and as GGUF's `llama.*` keys.

The keys, their types and their order are those of `TextModel.set_gguf_parameters` and `LlamaModel`
in llama.cpp's conversion/base.py and llama.py; the defaults those of transformers' LlamaConfig and
MistralConfig. Neither llama.cpp nor its converter knows Mistral's sliding_window in this
architecture: within the window the models are the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgemerge.architectures import MODEL_TYPES
from edgemerge.errors import FormatError
from edgemerge.formats.json_file import read_object
from edgemerge.formats.metadata import encode_value
from edgemerge.types import Float32

__all__ = ["HubConfig", "read_config", "rope_factors"]

CLASSES = ("LlamaForCausalLM", "LLaMAForCausalLM", "MistralForCausalLM")
DEFAULTS: dict[str, dict[str, int]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8},
}
MAX_COUNT = (1 << 31) - 1  # llama.cpp keeps these in 32 bits


@dataclass(frozen=True, slots=True)
class HubConfig:
    """What config.json says of the shapes and the arithmetic of a model."""

    architecture: str  # GGUF's name
    n_layers: int
    n_embd: int
    n_ff: int
    n_head: int
    n_kv_head: int
    head_dim: int
    vocab_size: int
    context_length: int
    rms_eps: float
    rope_theta: float
    rope: dict[
        str, Any
    ]  # rope_scaling, with rope_type and original_max_position_embeddings filled in
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    raw: dict[str, Any]  # config.json itself, for the tokenizer's token ids

    def expected_shape(self, stem: str) -> tuple[int, ...]:
        """Shape of a GGUF tensor, by its name without `blk.N.`."""
        q, kv = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        name, _, suffix = stem.rpartition(".")
        n_out, n_in = {
            "token_embd": (self.vocab_size, self.n_embd),
            "output": (self.vocab_size, self.n_embd),
            "output_norm": (self.n_embd, 0),
            "attn_norm": (self.n_embd, 0),
            "ffn_norm": (self.n_embd, 0),
            "attn_q": (q, self.n_embd),
            "attn_k": (kv, self.n_embd),
            "attn_v": (kv, self.n_embd),
            "attn_output": (self.n_embd, q),
            "ffn_gate": (self.n_ff, self.n_embd),
            "ffn_up": (self.n_ff, self.n_embd),
            "ffn_down": (self.n_embd, self.n_ff),
        }[name]
        return (n_out,) if suffix == "bias" or n_in == 0 else (n_out, n_in)

    def required(self, stem: str) -> bool:
        """Tell whether every layer must have this tensor; llama.cpp takes the others or not."""
        if stem.endswith(".weight"):
            return True
        return self.attention_bias if stem.startswith("attn") else self.mlp_bias

    def metadata(self) -> dict[str, bytes]:
        """Return the `llama.*` keys, encoded, in the converter's order."""
        keys = {
            "block_count": encode_value(self.n_layers, "u32"),
            "context_length": encode_value(self.context_length, "u32"),
            "embedding_length": encode_value(self.n_embd, "u32"),
            "feed_forward_length": encode_value(self.n_ff, "u32"),
            "attention.head_count": encode_value(self.n_head, "u32"),
            "attention.head_count_kv": encode_value(self.n_kv_head, "u32"),
            **self._rope_metadata(),
            "rope.freq_base": encode_value(self.rope_theta, "f32"),
            "attention.layer_norm_rms_epsilon": encode_value(self.rms_eps, "f32"),
            "attention.key_length": encode_value(self.head_dim, "u32"),
            "attention.value_length": encode_value(self.head_dim, "u32"),
            "vocab_size": encode_value(self.vocab_size, "u32"),
            "rope.dimension_count": encode_value(self.head_dim, "u32"),
        }
        return {f"{self.architecture}.{key}": value for key, value in keys.items()}

    def _rope_metadata(self) -> dict[str, bytes]:
        kind, rope = self.rope["rope_type"], self.rope
        if kind not in ("linear", "yarn"):
            return {}
        keys = {
            "rope.scaling.type": encode_value(kind, "str"),
            "rope.scaling.factor": encode_value(float(rope["factor"]), "f32"),
        }
        if kind == "yarn":
            original = rope["original_max_position_embeddings"]
            keys["rope.scaling.original_context_length"] = encode_value(original, "u32")
            for key, names in YARN_KEYS.items():
                value = next((rope[name] for name in names if rope.get(name) is not None), None)
                if value is not None:
                    keys[f"rope.scaling.yarn_{key}"] = encode_value(float(value), "f32")
        return keys


YARN_KEYS: dict[str, tuple[str, ...]] = {
    "ext_factor": ("extrapolation_factor",),
    "attn_factor": ("attention_factor", "attn_factor"),
    "beta_fast": ("beta_fast",),
    "beta_slow": ("beta_slow",),
}


def read_config(path: Path) -> HubConfig:
    """Read and check config.json.

    Raises
    ------
    FormatError
        The model is of a kind that edgemerge does not read, or a value is missing or absurd.
    """
    raw = read_object(path)
    check = _Checker(raw, path)
    model_type = check.kind()
    defaults = DEFAULTS[model_type]
    n_embd = check.count("hidden_size")
    n_head = check.count("num_attention_heads")
    n_kv_head = check.count("num_key_value_heads", defaults.get("num_key_value_heads", n_head))
    head_dim = check.count("head_dim", n_embd // n_head)
    if n_head % n_kv_head:
        raise check.refuse("num_key_value_heads", n_kv_head, f"a divisor of the {n_head} heads")
    if head_dim % 2:
        raise check.refuse("head_dim", head_dim, "even, as the rotation needs")
    context_length = check.count("max_position_embeddings", defaults["max_position_embeddings"])
    rope = check.rope(context_length)
    return HubConfig(
        architecture=MODEL_TYPES[model_type],
        n_layers=check.count("num_hidden_layers"),
        n_embd=n_embd,
        n_ff=check.count("intermediate_size"),
        n_head=n_head,
        n_kv_head=n_kv_head,
        head_dim=head_dim,
        vocab_size=check.count("vocab_size"),
        context_length=context_length,
        rms_eps=check.number(raw, "rms_norm_eps", 1e-6),
        rope_theta=check.number(rope, "rope_theta", check.number(raw, "rope_theta", 10000.0)),
        rope=rope,
        tied=check.flag("tie_word_embeddings"),
        attention_bias=check.flag("attention_bias"),
        mlp_bias=check.flag("mlp_bias"),
        raw=raw,
    )


class _Checker:
    """Values of config.json, each refused by name when it is not what it must be."""

    def __init__(self, raw: dict[str, Any], path: Path) -> None:
        self.raw = raw
        self.path = path

    def refuse(self, key: str, value: object, wanted: str) -> FormatError:
        return FormatError(
            f"{key} is {str(value)[:80]!r}, it must be {wanted}; correct the file", path=self.path
        )

    def kind(self) -> str:
        """Return model_type, having refused every model that is not plain Llama or Mistral."""
        model_type = self.raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
            raise FormatError(
                f"model_type {str(model_type)[:80]!r} is not read from a directory (only "
                f"{', '.join(MODEL_TYPES)}); convert the model to GGUF with llama.cpp first",
                path=self.path,
            )
        classes = self.raw.get("architectures")
        if isinstance(classes, list) and classes and classes[0] not in CLASSES:
            raise FormatError(
                f"architecture {str(classes[0])[:80]!r} is not a language model that edgemerge "
                f"reads (only {', '.join(CLASSES)}); convert it to GGUF with llama.cpp first",
                path=self.path,
            )
        quantised = self.raw.get("quantization_config")
        if quantised:
            method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
            raise FormatError(
                f"its weights are quantised by {str(method)[:40]!r}, which is not read from here; "
                "give the original fp16 or bf16 model, or a GGUF",
                path=self.path,
            )
        activation = self.raw.get("hidden_act", "silu")
        if activation != "silu":
            raise self.refuse("hidden_act", activation, "silu, as in llama.cpp's llama")
        return model_type

    def count(self, key: str, default: int | None = None) -> int:
        value = self.raw.get(key)
        if value is None:
            value = default
        if value is None:
            raise FormatError(f"{key} is missing; get the file again", path=self.path)
        if type(value) is not int or not 1 <= value <= MAX_COUNT:
            raise self.refuse(key, value, f"an integer from 1 to {MAX_COUNT}")
        return value

    def number(self, table: dict[str, Any], key: str, default: float | None = None) -> float:
        value = table.get(key)
        if value is None:
            value = default
        # 1e38: it has to survive as a float32. A bool is an int to isinstance.
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1e38:
            return float(value)
        raise self.refuse(key, value, "a positive number")

    def flag(self, key: str) -> bool:
        value = self.raw.get(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.refuse(key, value, "true or false")
        return value

    def rope(self, context_length: int) -> dict[str, Any]:
        """Return the rotation's parameters as transformers standardises them."""
        value = self.raw.get("rope_scaling") or self.raw.get("rope_parameters") or {}
        if not isinstance(value, dict):
            raise self.refuse("rope_scaling", value, "an object or null")
        rope = dict(value)
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind not in ("default", "linear", "llama3", "yarn"):
            raise FormatError(
                f"rope_scaling of type {str(kind)[:40]!r} has no equal in llama.cpp's llama (only "
                "linear, llama3, yarn); use a model without it",
                path=self.path,
            )
        rope["rope_type"] = kind
        partial = rope.get("partial_rotary_factor", self.raw.get("partial_rotary_factor"))
        if partial not in (None, 1, 1.0):
            raise self.refuse("partial_rotary_factor", partial, "1, as in llama.cpp's llama")
        if kind in ("llama3", "yarn"):
            outer = self.raw.get("original_max_position_embeddings")
            original = outer or rope.get("original_max_position_embeddings") or context_length
            if type(original) is not int or not 1 <= original <= MAX_COUNT:
                raise self.refuse(
                    "original_max_position_embeddings", original, "a positive integer"
                )
            rope["original_max_position_embeddings"] = original
        if kind == "llama3":
            for key, default in LLAMA3_DEFAULTS.items():
                rope[key] = self.number(rope, key, default)
            if rope["low_freq_factor"] == rope["high_freq_factor"]:
                raise self.refuse(
                    "high_freq_factor", rope["high_freq_factor"], "above low_freq_factor"
                )
        elif kind != "default":
            rope["factor"] = self.number(rope, "factor")
        for names in YARN_KEYS.values() if kind == "yarn" else ():
            for name in names:
                if rope.get(name) is not None:
                    self.number(rope, name)
        return rope


LLAMA3_DEFAULTS = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def rope_factors(config: HubConfig) -> Float32 | None:
    """Return the (head_dim / 2,) divisors of rope_freqs.weight for rope type llama3, else None.

    As `LlamaModel.generate_extra_tensors` computes them: in float32, step by step. Its power is
    torch's, ours a rounded float64, so that the bytes do not depend on a vector library.
    """
    rope = config.rope
    if rope["rope_type"] != "llama3":
        return None
    f32 = np.float32
    factor, low, high = (rope[key] for key in LLAMA3_DEFAULTS)
    original = rope["original_max_position_embeddings"]
    factors = np.empty(config.head_dim // 2, np.float32)
    for i in range(len(factors)):
        exponent = f32(2 * i) / f32(config.head_dim)
        freq = f32(1.0) / f32(math.pow(config.rope_theta, float(exponent)))
        wavelength = f32(2 * math.pi) / freq
        if wavelength < original / high:
            factors[i] = 1.0
        elif wavelength > original / low:
            factors[i] = factor
        else:
            smooth = (f32(original) / wavelength - f32(low)) / f32(high - low)
            factors[i] = f32(1.0) / ((f32(1.0) - smooth) / f32(factor) + smooth)
    return factors
