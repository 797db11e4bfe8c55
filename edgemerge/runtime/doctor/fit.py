"""Which models fit into memory: weights, KV cache, scratch and process, from a model's shape alone.

    need = weights + n_ctx * kv_token + scratch(n_ctx) + PROCESS_BYTES

- weights: the tensors' bytes in the file; llama.cpp maps them, and generation reads all of them per token.
- kv_token = 2 bytes (float16) * n_layers * n_kv_heads * (key length + value length)
- scratch = UBATCH * (4.5 * n_ff * 4 bytes + n_masks * n_ctx * 2 bytes): a batch's activations and masks.
  The 4.5 was measured: with llama-cpp-python 0.3.36 it gives SmolLM2-135M's and Gemma-3-270M's within 2 %.
- PROCESS_BYTES: Python, NumPy and llama.cpp itself, measured likewise.

`context_size` measures a loaded model instead; this judges models that are not loaded, or not even here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgemerge.formats import open_model
from edgemerge.formats.gguf.metadata import Array, encode_value, get_value
from edgemerge.formats.gguf.types import row_bytes
from edgemerge.formats.quants.filetypes import tensor_types
from edgemerge.types import Source, TensorSpec

__all__ = ["EXAMPLES", "FILE_TYPES", "MAX_LAYERS", "PROCESS_BYTES", "TABLE_CONTEXT", "Example"]
__all__ += ["Fit", "ModelFit", "Needs", "fit_examples", "fit_model", "judge", "read_needs"]

PROCESS_BYTES = 64 << 20
UBATCH = 512  # tokens that llama.cpp computes at a time
TABLE_CONTEXT = 4096
FILE_TYPES = ("Q4_K_M", "Q8_0", "F16")
MAX_LAYERS = 4096  # more than any model has; of a longer list the rest is not read
_COMFORTABLE = 0.9  # of the memory available; above it the weights' pages begin to be dropped
_CONTEXT_STEP = 256


@dataclass(frozen=True, slots=True)
class Example:
    """Shape of a published model, from its config.json."""

    name: str
    n_layers: int
    n_embd: int
    n_ff: int
    n_heads: int
    n_kv_heads: int
    n_vocab: int
    is_tied: bool = True  # whether input and output share one embedding


EXAMPLES = (
    Example("SmolLM2-135M", 30, 576, 1536, 9, 3, 49152),
    Example("SmolLM2-360M", 32, 960, 2560, 15, 5, 49152),
    Example("Qwen2.5-0.5B", 24, 896, 4864, 14, 2, 151936),
    Example("Llama-3.2-1B", 16, 2048, 8192, 32, 8, 128256),
    Example("Qwen2.5-1.5B", 28, 1536, 8960, 12, 2, 151936),
    Example("Llama-3.2-3B", 28, 3072, 8192, 24, 8, 128256),
    Example("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128256, is_tied=False),
    Example("Qwen2.5-14B", 48, 5120, 13824, 40, 8, 152064, is_tied=False),
)


@dataclass(frozen=True, slots=True)
class Needs:
    """Memory that a model takes when it runs.

    Attributes
    ----------
    weights : int
        Bytes.
    kv_token : int
        Bytes of KV cache per token of context.
    n_ff : int
        Width of the feed-forward layers, by which the scratch goes.
    n_masks : int
        Attention masks: two where some layers see a sliding window only.
    """

    weights: int
    kv_token: int
    n_ff: int
    n_masks: int = 1

    def at(self, n_ctx: int) -> int:
        """Bytes with a context of so many tokens."""
        scratch = UBATCH * (18 * self.n_ff + 2 * self.n_masks * n_ctx)
        return self.weights + n_ctx * self.kv_token + scratch + PROCESS_BYTES

    def longest_context(self, available: int, limit: int) -> int:
        """Most tokens, in steps of 256 up to `limit`, that fit comfortably; 0 where none do."""
        room = int(_COMFORTABLE * available) - self.at(0)
        n_ctx = room // (self.kv_token + 2 * self.n_masks * UBATCH)
        return limit if n_ctx >= limit else max(0, n_ctx // _CONTEXT_STEP * _CONTEXT_STEP)


@dataclass(frozen=True, slots=True)
class Fit:
    """One cell of the table: a published model in one file type, with 4096 tokens of context."""

    model: str
    file_type: str
    bytes: int
    verdict: str


@dataclass(frozen=True, slots=True)
class ModelFit:
    """Whether a file fits.

    Attributes
    ----------
    path : Path
        The model.
    needs : Needs
        What it takes.
    n_ctx_train : int
        Tokens that it was trained for.
    n_ctx : int
        Tokens that fit comfortably, up to those; 0 where none do.
    bytes : int
        With `n_ctx` tokens or, where none fit, with 4096 at most.
    verdict : str
        As of `judge`.
    """

    path: Path
    needs: Needs
    n_ctx_train: int
    n_ctx: int
    bytes: int
    verdict: str


def judge(n_bytes: int, available: int) -> str:
    """Say whether something fits: `fits` into 90 % of the memory, `tight` into all of it, or `no`."""
    if n_bytes <= _COMFORTABLE * available:
        return "fits"
    return "tight" if n_bytes <= available else "no"


def fit_examples(available: int) -> tuple[Fit, ...]:
    """Judge published models from 135 M to 14 B parameters, in three file types.

    Parameters
    ----------
    available : int
        Bytes of memory that may be taken.
    """
    fits = []
    for example in EXAMPLES:
        for file_type in FILE_TYPES:
            n_bytes = _needs_of_example(example, file_type).at(TABLE_CONTEXT)
            fits.append(Fit(example.name, file_type, n_bytes, judge(n_bytes, available)))
    return tuple(fits)


def _needs_of_example(example: Example, file_type: str) -> Needs:
    head_dim = example.n_embd // example.n_heads
    shapes = {"token_embd.weight": (example.n_vocab, example.n_embd)}
    if not example.is_tied:
        shapes["output.weight"] = shapes["token_embd.weight"]
    for layer in range(example.n_layers):
        block = {
            "attn_q": (example.n_heads * head_dim, example.n_embd),
            "attn_k": (example.n_kv_heads * head_dim, example.n_embd),
            "attn_v": (example.n_kv_heads * head_dim, example.n_embd),
            "attn_output": (example.n_embd, example.n_heads * head_dim),
            "ffn_gate": (example.n_ff, example.n_embd),
            "ffn_up": (example.n_ff, example.n_embd),
            "ffn_down": (example.n_embd, example.n_ff),
        }
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    specs = {
        name: TensorSpec(name, shape, "F16", 2 * shape[0] * shape[1])
        for name, shape in shapes.items()
    }
    metadata = {
        "llama.block_count": encode_value(example.n_layers, "u32"),
        "llama.attention.head_count": encode_value(example.n_heads, "u32"),
        "llama.attention.head_count_kv": encode_value(example.n_kv_heads, "u32"),
    }
    types = tensor_types(file_type, specs, metadata, "llama")
    weights = sum(spec.n_rows * row_bytes(types[name], spec.n_cols) for name, spec in specs.items())
    return Needs(weights, 4 * example.n_layers * example.n_kv_heads * head_dim, example.n_ff)


def fit_model(path: Path, available: int) -> ModelFit:
    """Judge a GGUF file or a Hugging Face directory by its header; no weights are read.

    Parameters
    ----------
    path : Path
        The model. Its tensors count as they are stored.
    available : int
        Bytes of memory that may be taken.

    Raises
    ------
    FormatError
        The file is damaged or no model.
    """
    source = open_model(path)
    try:
        needs, n_ctx_train = read_needs(source)
    finally:
        source.close()
    n_ctx = needs.longest_context(available, n_ctx_train)
    n_bytes = needs.at(n_ctx or min(TABLE_CONTEXT, n_ctx_train))
    verdict = "fits" if n_ctx else judge(needs.at(_CONTEXT_STEP), available)
    return ModelFit(path, needs, n_ctx_train, n_ctx, n_bytes, verdict)


def read_needs(source: Source) -> tuple[Needs, int]:
    """Read off a header the memory that a model needs, and the tokens it was trained on.

    Its tensors count as they are stored.
    """
    weights = sum(spec.nbytes for spec in source.specs().values())
    return _read_needs(source.metadata(), source.architecture, weights)


def _read_needs(metadata: Mapping[str, bytes], arch: str, weights: int) -> tuple[Needs, int]:
    """Needs and training context from the metadata; a list has one value per layer, none is below 0."""

    def numbers(key: str, default: int) -> list[int]:
        value = get_value(metadata, f"{arch}.{key}", default)
        values = value[:MAX_LAYERS] if isinstance(value, Array) else [value]
        stated = (n for n in values if isinstance(n, int | float) and math.isfinite(n))
        return [max(0, int(number)) for number in stated] or [default]

    (n_layers,), (n_embd,) = numbers("block_count", 0)[:1], numbers("embedding_length", 0)[:1]
    n_heads = max(1, *numbers("attention.head_count", 1))
    n_kv_heads = numbers("attention.head_count_kv", n_heads)
    n_kv_all = n_kv_heads[0] * n_layers if len(n_kv_heads) == 1 else sum(n_kv_heads)
    (key,) = numbers("attention.key_length", n_embd // n_heads)[:1]
    (value,) = numbers("attention.value_length", n_embd // n_heads)[:1]
    (n_used,) = numbers("expert_used_count", 0)[:1]
    (n_expert_ff,) = numbers("expert_feed_forward_length", 0)[:1]
    n_ff = max(*numbers("feed_forward_length", 4 * n_embd), n_used * n_expert_ff)
    (n_ctx_train,) = numbers("context_length", TABLE_CONTEXT)[:1]
    n_masks = 2 if f"{arch}.attention.sliding_window" in metadata else 1
    return Needs(weights, 2 * n_kv_all * (key + value), n_ff, n_masks), n_ctx_train
