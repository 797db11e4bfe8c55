"""How a model's process is set up, and what it says of itself when it is ready."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from edgemerge.runtime.llama import Lora

__all__ = ["CHUNK", "KEPT_PART", "KV_TYPES", "ROWS", "EngineFacts", "EngineOptions"]

CHUNK = 256  # tokens of prompts in one batch
# Of logits in one batch, beside those that are drawn; one has a megabyte for 256 000 tokens.
ROWS = 32
KEPT_PART = 0.5  # of the cache's bytes, as many again for sequences that may be wanted again
KV_TYPES = ("f16", "q8_0")  # of the cache's keys and values


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """A model, and what it may use.

    Attributes
    ----------
    path : Path
        A GGUF file; of a split model, any part.
    n_ctx : int
        Tokens of the cache, which all sequences use together; one may have as many.
    n_sequences : int
        Answers that are computed at a time.
    n_threads : int or None
        Threads that compute; None for as many as are fastest, which is measured.
    n_gpu_layers : int or None
        Layers on the GPU; None for all where llama.cpp was built for one.
    loras : tuple of Lora
        Adapters to add.
    kv_type : str
        One of `KV_TYPES`.
    flash : bool or None
        Whether to use flash attention; None leaves it to llama.cpp.
    n_chunk : int
        Tokens of prompts in one batch, at most.
    n_longest : int or None
        Tokens that one sequence may have, where that is less than `n_ctx`.
    rpc : tuple of str
        `ADDRESS:PORT` of rpc workers that compute the layers.
    memory : int or None
        Bytes that the process may take. The cache has fewer tokens where it would take more; None for
        what `n_ctx` needs.
    """

    path: Path
    n_ctx: int = 4096
    n_sequences: int = 8
    n_threads: int | None = None
    n_gpu_layers: int | None = None
    loras: tuple[Lora, ...] = ()
    kv_type: str = "f16"
    flash: bool | None = None
    n_chunk: int = CHUNK
    n_longest: int | None = None
    memory: int | None = None
    rpc: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """A loaded model.

    Attributes
    ----------
    n_ctx : int
        Tokens that one answer may have with its prompt, or a text that is embedded.
    n_sequences : int
        Answers at a time.
    n_vocab : int
        Tokens that there are.
    has_template : bool
        Whether it has a chat template.
    reads_whole : bool
        Whether it is an encoder: it embeds texts and writes none.
    can_rerank : bool
        Whether it orders texts by a question.
    fingerprint : str
        Other weights have another one.
    memory : dict of str to int
        Bytes of `weights`, `kv`, `compute` and `output`, as llama.cpp says; and of `kept`, what sequences
        that are not in use may take at most.
    """

    n_ctx: int
    n_sequences: int
    n_vocab: int
    has_template: bool
    reads_whole: bool
    can_rerank: bool
    fingerprint: str
    memory: dict[str, int] = field(default_factory=dict)
