"""The models of a server: loaded when asked for, the longest unused closed when memory is short."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edgemerge.errors import BudgetError, EdgemergeError, RecipeError
from edgemerge.formats.gguf.metadata import Array, get_value
from edgemerge.formats.gguf.model import GgufModel
from edgemerge.runtime.doctor.fit import MAX_LAYERS, Needs, read_needs
from edgemerge.runtime.model_files import open_gguf
from edgemerge.runtime.serve.errors import SERVER, Refusal
from edgemerge.sizes import format_size

__all__ = [
    "BATCH",
    "OUTPUTS",
    "ModelFile",
    "ModelStore",
    "Servable",
    "estimate_memory",
    "read_model_file",
]

log = logging.getLogger(__name__)

DEFAULT_CONTEXT = 4096  # tokens, where the model was trained for as many
# Prompt tokens per call: 512 were 3 % faster on SmolLM2-135M; a request stops between two calls.
BATCH = 128
OUTPUTS = 32  # rows of logits per call; a row has a megabyte where the vocabulary is 256 000


class Servable(Protocol):
    """What the store asks of a loaded model."""

    def close(self) -> None:
        """Free it."""


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
        Tokens of context that it gets.
    n_bytes : int
        Of the file.
    need : int
        Bytes of memory when loaded: `estimate_memory`.
    tokenizer : dict
        Text of the tokens that begin and end a sequence, and the chat template, as vLLM's
        /tokenizer_info tells them; None where the file has none.
    created : int
        Unix time of the file.
    """

    name: str
    path: Path
    n_ctx: int
    n_bytes: int
    need: int
    tokenizer: dict[str, str | None]
    created: int


def read_model_file(text: str, n_ctx: int | None = None) -> ModelFile:
    """Read the header of a model to serve.

    Parameters
    ----------
    text : str
        `FILE`, or `NAME=FILE`; the name is else the file's without `.gguf`.
    n_ctx : int, optional
        Tokens of context; by default what the model was trained for, up to 4096.

    Raises
    ------
    FormatError
        It is no GGUF file, or a damaged one.
    RuntimeFailure
        It is a folder, or is not there.
    """
    name, equals, rest = text.partition("=")
    path = Path(rest if equals and not Path(text).exists() else text)
    if path == Path(text):
        name = path.stem
    source = open_gguf(path)
    try:
        needs, n_ctx_train = read_needs(source)
        n_ctx = n_ctx or min(n_ctx_train, DEFAULT_CONTEXT)
        facts = path.stat()
        return ModelFile(
            name,
            path,
            n_ctx,
            facts.st_size,
            estimate_memory(source, needs, n_ctx),
            _read_tokenizer(source.metadata()),
            int(facts.st_mtime),
        )
    finally:
        source.close()


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


def estimate_memory(source: GgufModel, needs: Needs, n_ctx: int) -> int:
    """Bytes that a model takes when loaded: weights, KV cache, scratch, logits.

    Weights are mapped and count in full: a server that runs reads all of them for every token.
    Scratch is llama.cpp's for a batch: activations, and attention scores in float32. Rows of logits
    are kept twice, as computed and as given out. On SmolLM2-135M and Gemma-3-270M with 512 to 8192
    tokens the sum is 3 to 10 % above what llama.cpp reports.

    Parameters
    ----------
    source : GgufModel
        The open file.
    needs : Needs
        What its shape says.
    n_ctx : int
        Tokens of context.
    """
    heads = get_value(source.metadata(), f"{source.architecture}.attention.head_count", 1)
    several = heads[:MAX_LAYERS] if isinstance(heads, Array) else [heads]
    n_heads = max((n for n in several if isinstance(n, int)), default=1)
    table = source.specs().get("token_embd.weight")
    n_vocab = table.shape[0] if table is not None else 0
    scratch = BATCH * (18 * needs.n_ff + 4 * n_heads * n_ctx)
    return needs.weights + n_ctx * needs.kv_token + scratch + 2 * OUTPUTS * 4 * n_vocab


class ModelStore:
    """The models by name; stands where llama-cpp-python's app has its `LlamaProxy`.

    Only whoever has the turn of the queue may call it or `load`: what is in use is then the model
    asked for last, and that one is never closed.

    Parameters
    ----------
    files : sequence of ModelFile
        At least one; the first answers requests that name none.
    load : function
        Loads a file.
    budget : int
        Bytes that the whole process may take.
    floor : int
        Bytes that it takes without any model.

    Raises
    ------
    RecipeError
        Two files have one name.
    BudgetError
        A model does not fit, even alone.
    """

    def __init__(
        self,
        files: Sequence[ModelFile],
        load: Callable[[ModelFile], Servable],
        *,
        budget: int,
        floor: int,
    ) -> None:
        self.files = {file.name: file for file in files}
        self.budget = budget
        self.default = files[0].name
        self._load = load
        self._floor = floor
        self._loaded: dict[str, Servable] = {}  # longest unused first
        for file in files:
            if self.files[file.name] is not file:
                raise RecipeError(
                    f"two models are called {file.name}: name one of them, as in other={file.path}"
                )
            if floor + file.need > budget:
                raise BudgetError(
                    f"{file.path} needs {format_size(floor + file.need)} with {file.n_ctx} tokens of "
                    f"context and the server may take {format_size(budget)}: give more --memory or "
                    "a smaller --ctx",
                    needed=floor + file.need,
                    budget=budget,
                )

    def __iter__(self) -> Iterator[str]:
        """Names of all models."""
        return iter(self.files)

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of those in memory."""
        return tuple(self._loaded)

    def resolve(self, name: str | None) -> str:
        """Name of the model that a request means.

        Raises
        ------
        Refusal
            404: there is no such model.
        """
        if name is None:
            return self.default
        if name not in self.files:
            raise Refusal(404, f"The model {name[:100]!r} does not exist.", code="model_not_found")
        return name

    def preload(self) -> None:
        """Load the default model.

        Raises
        ------
        RuntimeFailure
            llama.cpp refuses it.
        """
        self._loaded[self.default] = self._load(self.files[self.default])

    def __call__(self, name: str | None = None) -> Servable:
        """Give a model by its name, loaded if need be."""
        return self.load(self.resolve(name))

    def load(self, name: str) -> Servable:
        """Give a model; closes the longest unused ones where it would not fit beside them.

        Raises
        ------
        Refusal
            503 where its file is gone, 500 where llama.cpp refuses it; the log has the reason.
        """
        model = self._loaded.pop(name, None)
        if model is None:
            self._make_room(self.files[name].need)
            model = self._open(name)
        self._loaded[name] = model  # now the last
        return model

    def _make_room(self, need: int) -> None:
        while self._loaded and self._floor + self._taken() + need > self.budget:
            oldest = next(iter(self._loaded))
            log.info("closing %s to make room", oldest)
            self._loaded.pop(oldest).close()

    def _taken(self) -> int:
        return sum(self.files[name].need for name in self._loaded)

    def _open(self, name: str) -> Servable:
        file = self.files[name]
        if not file.path.is_file():
            log.error("%s: the file is gone", file.path)
            raise Refusal(
                503,
                f"the file of the model {name!r} is not there at the moment",
                kind=SERVER,
                code="model_unavailable",
                retry_after=30,
            )
        log.info("loading %s", name)
        try:
            return self._load(file)
        except EdgemergeError as error:
            log.error("%s", error)
            raise Refusal(
                500,
                f"the model {name!r} cannot be loaded; the server's log says why",
                kind=SERVER,
                code="model_unavailable",
            ) from None

    def close(self) -> None:
        """Free all models."""
        while self._loaded:
            self._loaded.popitem()[1].close()
