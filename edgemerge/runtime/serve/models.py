"""The files of models to serve, and what each of them will take of memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from edgemerge.errors import BudgetError, RuntimeFailure
from edgemerge.formats.gguf.metadata import Array, get_value
from edgemerge.formats.gguf.model import GgufModel, parts_of
from edgemerge.recipe.values import is_utf8
from edgemerge.runtime.board.device import read_memory
from edgemerge.runtime.doctor.fit import MAX_LAYERS, PROCESS_BYTES, Needs, read_needs
from edgemerge.runtime.engine.options import CHUNK, KEPT_PART, ROWS
from edgemerge.runtime.model_files import open_gguf
from edgemerge.sizes import format_size

__all__ = ["DEFAULT_CONTEXT", "DEFAULT_SEQUENCES", "ModelFile", "Stamps", "read_model_file"]
__all__ += ["check_size", "find_stamps", "read_stamps", "usable_memory"]

DEFAULT_CONTEXT = 4096  # tokens, where the model was trained for as many
DEFAULT_SEQUENCES = 8
_USED_PART = 0.9  # of the memory that is available, where no budget is given
_KV_SHARE = {"f16": 1.0, "q8_0": 34 / 64}  # q8_0 has 34 bytes for 32 values

# Of each file device, inode, bytes, and when contents and inode last changed.
Stamps = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A model that may be loaded.

    Attributes
    ----------
    name : str
        What clients call it.
    path : Path
        GGUF file.
    n_ctx : int
        Tokens of context that one request gets.
    n_bytes : int
        Of the file.
    base : int
        Bytes of memory when loaded, without what goes by the tokens kept.
    tokenizer : dict
        Text of the tokens that begin and end a sequence, and the chat template, as vLLM's
        /tokenizer_info tells them; None where the file has none.
    created : int
        Unix time of the file.
    token_bytes : int
        Bytes per token that is kept.
    n_cache : int
        Tokens that all requests together keep.
    n_sequences : int
        Requests at a time.
    stamps : Stamps
        What shows that the files are still those that were read.
    """

    name: str
    path: Path
    n_ctx: int
    n_bytes: int
    base: int
    tokenizer: dict[str, str | None]
    created: int
    token_bytes: int = 0
    n_cache: int = 0
    n_sequences: int = 1
    stamps: Stamps = ()

    @property
    def is_short(self) -> bool:
        """Whether memory holds fewer tokens than it would keep."""
        return self.n_cache < _kept_tokens(self.n_ctx, self.n_sequences)

    @property
    def need(self) -> int:
        """Bytes of memory when loaded."""
        return self.base + self.n_cache * self.token_bytes

    def within(self, room: int) -> ModelFile:
        """Take the same with fewer tokens kept, where it needs more than `room` bytes.

        One request keeps its full context.
        """
        fitting = (room - self.base) // max(self.token_bytes, 1)
        return replace(self, n_cache=max(min(self.n_cache, fitting), self.n_ctx))


def usable_memory(floor: int) -> int:
    """Bytes that a server takes at most by default: `floor`, which it has, and most of what is free."""
    return floor + int(_USED_PART * read_memory().available)


def read_model_file(
    path: Path,
    n_ctx: int | None = None,
    *,
    name: str | None = None,
    n_sequences: int = DEFAULT_SEQUENCES,
    kv_type: str = "f16",
    rpc_layers: int = 0,
) -> ModelFile:
    """Read the header of a model to serve.

    All requests together keep half of what they would need with full contexts: most are shorter, and
    what they begin with in common is kept once.

    Parameters
    ----------
    path : Path
        The file.
    n_ctx : int, optional
        Tokens of context for a request, at most what the model was trained for; by default up to 4096.
    name : str, optional
        What clients are told; by default the file's name without `.gguf`, which they are not.
    n_sequences : int
        Requests at a time.
    kv_type : str
        Type of the cache: f16 or q8_0.
    rpc_layers : int
        Layers that rpc workers compute.

    Raises
    ------
    FormatError
        It is no GGUF file, or a damaged one.
    RuntimeFailure
        It is a folder, or is not there; it changed meanwhile; or clients cannot be told its name.
    """
    stamps = find_stamps(path)
    source = open_gguf(path)
    try:
        if name is not None:
            _check_names(name, path)
        needs, n_ctx_train = read_needs(source)
        n_ctx = n_ctx or DEFAULT_CONTEXT
        n_ctx = min(n_ctx, n_ctx_train or n_ctx)  # as the engine does, whatever is asked for
        facts = path.stat()
        base, token_bytes = _estimate_memory(source, needs, n_sequences, kv_type, rpc_layers)
        file = ModelFile(
            path.stem if name is None else name,
            path,
            n_ctx,
            facts.st_size,
            base,
            _read_tokenizer(source.metadata()),
            int(facts.st_mtime),
            token_bytes,
            _kept_tokens(n_ctx, n_sequences),
            n_sequences,
            stamps,
        )
        if find_stamps(path) != stamps:  # else the header of one file had the stamps of another
            raise RuntimeFailure(
                f"{path}: changed while it was read; see who writes there, and load it again"
            )
        return file
    finally:
        source.close()


def read_stamps(path: Path) -> Stamps:
    """Note what a model's files are now.

    Raises
    ------
    RuntimeFailure
        One cannot be read.
    """
    try:
        found = [os.stat(part) for part in parts_of(path)]
    except OSError as error:
        raise RuntimeFailure(
            f"{path}: cannot be read ({error.strerror}); check the path"
        ) from error
    return tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in found)


def find_stamps(path: Path) -> Stamps:
    """Note what a model's files are now; nothing where one cannot be read."""
    try:
        return read_stamps(path)
    except RuntimeFailure:
        return ()


def check_size(file: ModelFile, floor: int, budget: int) -> None:
    """See that a model fits into a server's memory alone.

    Raises
    ------
    BudgetError
        With the `floor` that the server takes anyway it needs more than the budget.
    """
    needed = floor + file.need
    if needed > budget:
        raise BudgetError(
            f"{file.path} needs {format_size(needed)} with {file.n_ctx} tokens of context and the server "
            f"may take {format_size(budget)}: give more --memory or a smaller --ctx",
            needed=needed,
            budget=budget,
        )


def _check_names(name: str, path: Path) -> None:
    """Refuse what JSON cannot spell; the Models tab tells where a link leads."""
    for text in (name, path.name, path.resolve().name):
        if not is_utf8(text):
            raise RuntimeFailure(f"{path}: the name {text!r} is not UTF-8; rename it")


def _kept_tokens(n_ctx: int, n_sequences: int) -> int:
    return max(n_ctx, n_ctx * n_sequences // 2)


def _read_tokenizer(metadata: Mapping[str, bytes]) -> dict[str, str | None]:
    tokens = get_value(metadata, "tokenizer.ggml.tokens")

    def text(key: str) -> str | None:
        i = get_value(metadata, f"tokenizer.ggml.{key}_token_id", -1)
        known = isinstance(tokens, Array) and isinstance(i, int) and 0 <= i < len(tokens)
        return str(tokens[i]) if known else None  # type: ignore[index]

    template = get_value(metadata, "tokenizer.chat_template")
    return {
        "bos_token": text("bos"),
        "eos_token": text("eos"),
        "chat_template": template if isinstance(template, str) else None,
    }


def _estimate_memory(
    source: GgufModel, needs: Needs, n_sequences: int, kv_type: str, rpc_layers: int
) -> tuple[int, int]:
    """Bytes that a model takes when loaded: at once, and for each token that is kept.

    Weights are mapped and count in full: a server that runs reads all of them for every token.
    Scratch is llama.cpp's for a batch: activations, and attention scores in float32. Rows of logits
    are kept twice, as computed and as given out. Beside the cache there are sequences that were copied
    out of it. The process itself is Python and llama.cpp. Layers of rpc workers have their weights and
    their cache there; the table of tokens and what is copied out of the cache stay here.

    Parameters
    ----------
    source : GgufModel
        The open file.
    needs : Needs
        What its shape says.
    n_sequences : int
        Requests at a time.
    kv_type : str
        Type of the cache.
    rpc_layers : int
        Layers that rpc workers compute, the output's among them.
    """
    heads = get_value(source.metadata(), f"{source.architecture}.attention.head_count", 1)
    several = heads[:MAX_LAYERS] if isinstance(heads, Array) else [heads]
    n_heads = max((n for n in several if isinstance(n, int)), default=1)
    table = source.specs().get("token_embd.weight")
    n_vocab = table.shape[0] if table is not None else 0
    n_layers = get_value(source.metadata(), f"{source.architecture}.block_count", 0)
    n_all = 1 + (n_layers if isinstance(n_layers, int) else 0)
    part = 1 - min(rpc_layers, n_all) / n_all  # of the layers, computed here
    table_bytes = table.nbytes if table is not None else 0
    weights = table_bytes + int(part * (needs.weights - table_bytes))
    base = weights + CHUNK * 18 * needs.n_ff + PROCESS_BYTES
    base += 2 * (n_sequences + ROWS) * 4 * n_vocab
    kv_bytes = needs.kv_token * _KV_SHARE[kv_type] * (part + KEPT_PART)
    return base, int(kv_bytes) + CHUNK * 4 * n_heads
