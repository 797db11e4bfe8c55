"""Load a GGUF with llama.cpp and run tokens through it.

A thin layer over the C interface of llama-cpp-python. Its `Llama` class holds one sequence at a
time; scoring needs many with one prompt, so the batch is built here. Nothing is printed: the
tail of llama.cpp's log goes into `RuntimeFailure.detail`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

from edgemerge.runtime.board.device import default_threads
from edgemerge.runtime.closing import Closing
from edgemerge.runtime.context import Context
from edgemerge.runtime.library import Buffers, load_library
from edgemerge.runtime.model_files import check_adapter, check_writes, model_files
from edgemerge.runtime.rpc.backend import connect, keep_alive
from edgemerge.runtime.thread_counts import ThreadCounts, find_threads

__all__ = ["Context", "Lora", "Model"]

_ALL_LAYERS = 0x7FFFFFFF  # llama.cpp takes more than there are as all of them


@dataclass(frozen=True, slots=True)
class Lora:
    """A low-rank adapter (GGUF, of convert_lora_to_gguf) and the factor that it is added with."""

    path: Path
    scale: float = 1.0


class Model(Closing):
    """A model that llama.cpp has loaded; use it in a `with` statement.

    Parameters
    ----------
    path : str or path
        A GGUF file; of a split model, any part.
    n_threads : int, optional
        Threads that compute; by default as many as are fastest, which the first context measures.
    n_gpu_layers : int, optional
        Layers to put on the GPU; by default all where llama.cpp was built for one, else none.
    loras : sequence of Lora
        Adapters to add to the weights as the model runs.
    encoders : bool
        Whether models are taken too that embed texts and do not continue them.
    rpc : sequence of str
        `ADDRESS:PORT` of rpc workers, which compute the layers that else a GPU would; all by default. Where
        one is lost, this process ends (`rpc.loss`).

    Raises
    ------
    RuntimeFailure
        llama.cpp is not installed, or refuses a file; `detail` has the end of its log.
    FormatError
        A file is damaged, or breaks a rule of llama.cpp's that would end the process.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        n_threads: int | None = None,
        n_gpu_layers: int | None = None,
        loras: Sequence[Lora] = (),
        encoders: bool = False,
        rpc: Sequence[str] = (),
    ) -> None:
        self.path = Path(path)
        self._rpc = tuple(rpc)
        self.use_threads(n_threads)
        files = model_files(self.path)  # what is missing is said better here than by llama.cpp
        if not encoders:
            check_writes(self.path)
        for lora in loras:
            check_adapter(lora.path, self.path)
        self.library = load_library()
        self.api = self.library.api
        if rpc:
            connect(self.library, rpc)
        self.loras: tuple[Lora, ...] = tuple(loras)
        self._handle = self._load(files[0], n_gpu_layers)
        self.adapters = [self._load_adapter(lora) for lora in loras]
        self.buffers: Buffers = self.library.buffers()
        self.vocab = self.api.llama_model_get_vocab(self._handle)
        self.n_vocab: int = self.api.llama_vocab_n_tokens(self.vocab)
        self.n_ctx_train: int = self.api.llama_model_n_ctx_train(self._handle)
        self.n_embd: int = self.api.llama_model_n_embd(self._handle)
        self.n_embd_out: int = self.api.llama_model_n_embd_out(self._handle)
        self.n_layers: int = self.api.llama_model_n_layer(self._handle)
        self.n_params: int = self.api.llama_model_n_params(self._handle)
        self.n_bytes: int = self.api.llama_model_size(self._handle)
        adds_bos = self.api.llama_vocab_get_add_bos(self.vocab)
        self._pieces: dict[tuple[int, bool], bytes] = {}
        self.bos: list[int] = [self.api.llama_vocab_bos(self.vocab)] if adds_bos else []

    def _load(self, first: Path, n_gpu_layers: int | None) -> Any:
        params = self.api.llama_model_default_params()
        if n_gpu_layers is None:
            n_gpu_layers = _ALL_LAYERS if self.library.has_device() else 0
        params.n_gpu_layers = n_gpu_layers
        self.library.start()
        handle = self.api.llama_model_load_from_file(os.fsencode(first), params)
        if not handle:
            raise self.library.load_failure(self.path)
        if self._rpc:
            keep_alive(self._rpc)
        return handle

    def _load_adapter(self, lora: Lora) -> Any:
        adapter = self.api.llama_adapter_lora_init(self._handle, os.fsencode(lora.path))
        if not adapter:
            failure = self.library.failure(
                f"{lora.path}: llama.cpp cannot add this LoRA adapter to {self.path}"
            )
            self.close()
            raise failure
        return adapter

    def use_threads(self, n_threads: int | None) -> None:
        """Compute with so many threads in contexts made from now on; None: as many as are fastest."""
        self._measures_threads = n_threads is None and not self._rpc  # whose threads are not ours
        n_threads = n_threads or default_threads()
        self.threads = ThreadCounts(n_threads, n_threads)

    @property
    def keeps_state(self) -> bool:
        """Whether it has a running state, as Mamba: sequences can neither share it nor cut it back."""
        recurrent, hybrid = self.api.llama_model_is_recurrent, self.api.llama_model_is_hybrid
        return bool(recurrent(self._handle) or hybrid(self._handle))

    @property
    def has_workers(self) -> bool:
        """Whether rpc workers compute layers of it."""
        return bool(self._rpc)

    @property
    def n_threads(self) -> int:
        """Threads that generate."""
        return self.threads.generate

    def close(self) -> None:
        """Free the model and its adapters; its contexts must be closed before."""
        if self._handle:
            self.api.llama_model_free(self._handle)
            self._handle = None

    @cached_property
    def description(self) -> str:
        """Architecture, size and type as llama.cpp names them, e.g. `llama 135M Q4_1`."""
        return self._text(lambda *to: self.api.llama_model_desc(self._handle, *to))

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The GGUF's key-value pairs as text; llama.cpp leaves arrays out."""
        api, handle = self.api, self._handle
        pairs = {}
        for i in range(api.llama_model_meta_count(handle)):
            key = self._text(lambda *to, i=i: api.llama_model_meta_key_by_index(handle, i, *to))
            value = self._text(
                lambda *to, i=i: api.llama_model_meta_val_str_by_index(handle, i, *to)
            )
            pairs[key] = value
        return pairs

    @property
    def chat_template(self) -> str | None:
        """The model's own chat template (Jinja), if it has one."""
        return self._named_template(None)

    @property
    def rank_template(self) -> str | None:
        """Its text around a `{query}` and a `{document}`, if it is one that orders texts so."""
        return self._named_template(b"rerank")

    def _named_template(self, name: bytes | None) -> str | None:
        raw = self.api.llama_model_chat_template(self._handle, name)
        return None if raw is None else raw.decode("utf-8", errors="replace")

    @property
    def pooling(self) -> str | None:
        """How its file says that the tokens' vectors become one: a number of `llama_pooling_type`."""
        return self.metadata.get(f"{self.metadata.get('general.architecture')}.pooling_type")

    def token_text(self, token: int) -> str:
        """Text of a token in the vocabulary, e.g. `<s>`; empty for -1, which stands for none."""
        if token < 0:
            return ""
        raw: bytes | None = self.api.llama_vocab_get_text(self.vocab, token)
        return (raw or b"").decode("utf-8", errors="replace")

    @staticmethod
    def _text(read: Callable[[Any, int], int]) -> str:
        """Read a text by llama.cpp's convention: returns its length, whatever the buffer's."""
        size = 256
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = read(buffer, size)
            if length < size:
                return buffer.value.decode("utf-8", errors="replace")
            size = length + 1

    def tokenize(self, text: str, *, special: bool = False, add_special: bool = False) -> list[int]:
        """Token ids of a text, without `bos`.

        Parameters
        ----------
        text : str
            Any text.
        special : bool
            Whether `<|im_end|>` and its like in the text become the control tokens they name.
        add_special : bool
            Whether the tokens are added that the vocabulary puts before and after each text; `bos` is not
            doubled.
        """
        tokens = self._tokenize(text, special, add_special)
        is_doubled = add_special and self.bos and tokens[:2] == self.bos * 2
        return tokens[1:] if is_doubled else tokens

    def _tokenize(self, text: str, special: bool, add_special: bool) -> list[int]:
        raw = text.encode("utf-8")
        room = (
            len(raw) + 8
        )  # a token is at least a byte, but a table of characters may make more of them
        while True:
            buffer = (ctypes.c_int32 * room)()
            count = self.api.llama_tokenize(
                self.vocab, raw, len(raw), buffer, room, add_special, special
            )
            if count >= 0:
                return buffer[:count]
            room = -count

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """Bytes that a token stands for; a character may be spread over several tokens.

        Control tokens (`<|im_end|>`) stand for none, unless `special`.
        """
        known = self._pieces.get((token, special))
        if known is None:
            known = self._pieces[token, special] = self._read_piece(token, special)
        return known

    def _read_piece(self, token: int, special: bool) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = self.api.llama_token_to_piece(self.vocab, token, buffer, size, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def is_end(self, token: int) -> bool:
        """Whether a token ends the generation (end of sequence, of turn)."""
        return bool(self.api.llama_vocab_is_eog(self.vocab, token))

    def context(
        self,
        n_ctx: int,
        *,
        n_batch: int,
        n_sequences: int = 1,
        n_outputs: int = 1,
        exact: bool = False,
        n_ubatch: int = 512,
        **settings: Any,
    ) -> Context:
        """Make a context: the memory of the sequences that are being computed.

        Parameters
        ----------
        n_ctx : int
            Tokens that it holds, over all sequences.
        n_batch : int
            Most tokens in one `decode`.
        n_sequences : int
            Most sequences at a time.
        n_outputs : int
            Most logit rows from one `decode`. llama.cpp reserves n_outputs x n_vocab floats, which
            for a vocabulary of 256 000 is a megabyte per row.
        exact : bool
            Keep attention in float32 throughout. llama.cpp's flash attention adds values up in half
            precision: on the CPU that changes a log-likelihood by up to 4e-3, differently for each
            composition of a batch, where this leaves 1e-6 with float32 weights.
        n_ubatch : int
            Most tokens that are computed together; a larger `n_batch` is cut into these.
        **settings
            Other fields of `llama_context_params`.

        Raises
        ------
        RuntimeFailure
            llama.cpp cannot make it, for want of memory as a rule.
        """
        params = self.api.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = n_batch
        params.n_ubatch = min(n_batch, n_ubatch)
        params.n_seq_max = n_sequences
        params.n_outputs_max = max(n_outputs, n_sequences)
        params.n_outputs_max_per_seq = 0  # as many as in all
        params.n_threads, params.n_threads_batch = self.threads.generate, self.threads.prompt
        # one cache for all: a token can belong to several sequences and is computed once
        params.kv_unified = True
        if exact:
            params.flash_attn_type = self.api.LLAMA_FLASH_ATTN_TYPE_DISABLED
            params.type_k = params.type_v = self.api.GGML_TYPE_F32
        for name, value in settings.items():
            setattr(params, name, value)
        self.library.start()
        handle = self.api.llama_init_from_model(self._handle, params)
        if not handle:
            raise self.library.failure(
                f"{self.path}: llama.cpp cannot make a context of {n_ctx} tokens",
                "give a smaller --ctx, or in bench a smaller -p, -n and --depth",
            )
        if self._measures_threads:
            self.threads = find_threads(
                self.api, handle, n_bytes=self.n_bytes, most=default_threads()
            )
        return Context(self, handle)
