"""Load a GGUF with llama.cpp and run tokens through it.

A thin layer over the C interface of llama-cpp-python. Its `Llama` class holds one sequence at a
time; scoring needs many that share a prompt, so the batch is built here. Nothing is printed: the
tail of llama.cpp's log goes into `RuntimeFailure.detail`.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from edgemerge.errors import RuntimeFailure
from edgemerge.types import Float32

__all__ = ["Context", "Model"]

_LOG_LINES = 20
_WARNING, _ERROR = 3, 4  # enum ggml_log_level of ggml.h


@dataclass(frozen=True, slots=True)
class _Library:
    """llama.cpp in this process: one log, one backend."""

    api: Any
    log: deque[tuple[int, str]]  # (level, text): warnings and errors since it was last cleared
    callback: object  # C holds the pointer only; this keeps the function alive

    def failure(self, message: str) -> RuntimeFailure:
        """Make an error that carries what llama.cpp said; its first complaint is the cause."""
        lines = "".join(text for _, text in self.log).splitlines()
        errors = [text.strip() for level, text in self.log if level == _ERROR]
        reason = f" ({errors[0]})" if errors else ""
        return RuntimeFailure(f"{message}{reason}", detail="\n".join(lines))


@cache
def _library() -> _Library:
    # OpenMP's default is to spin while it waits: on a board with anything else to do, generation
    # fell from 25 to 0.8 tokens/s. libgomp reads this once, when it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        import llama_cpp
    except ImportError as error:
        raise RuntimeFailure(
            "running a model needs llama.cpp: install it with pip install 'edgemerge[run]'"
        ) from error
    except (OSError, RuntimeError) as error:  # its shared library is there and does not load
        raise RuntimeFailure(
            f"llama.cpp does not load ({error}): install it again with "
            "pip install --force-reinstall --no-cache-dir 'edgemerge[run]'",
            detail=str(error),
        ) from error
    log: deque[tuple[int, str]] = deque(maxlen=_LOG_LINES)

    def keep(level: int, text: bytes, user_data: object) -> None:
        if level in (_WARNING, _ERROR):
            log.append((level, text.decode("utf-8", errors="replace")))

    callback = llama_cpp.llama_log_callback(keep)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return _Library(llama_cpp, log, callback)


class Model:
    """A model that llama.cpp has loaded; use it in a `with` statement.

    Parameters
    ----------
    path : str or path
        A GGUF file; of a split model, the first part.
    n_threads : int, optional
        Threads that compute; by default every core this process may use.

    Raises
    ------
    RuntimeFailure
        llama.cpp is not installed, or refuses the file; `detail` has the end of its log.
    """

    def __init__(self, path: str | PathLike[str], *, n_threads: int | None = None) -> None:
        self.path = Path(path)
        self.n_threads = n_threads or len(os.sched_getaffinity(0))
        if not self.path.is_file():
            raise RuntimeFailure(f"{self.path}: there is no such file")
        self.library = _library()
        self.api = self.library.api
        self.library.log.clear()
        self._handle = self.api.llama_model_load_from_file(
            os.fsencode(self.path), self.api.llama_model_default_params()
        )
        if not self._handle:
            raise self.library.failure(f"{self.path}: llama.cpp cannot load this model")
        self._vocab = self.api.llama_model_get_vocab(self._handle)
        self.n_vocab: int = self.api.llama_vocab_n_tokens(self._vocab)
        self.n_ctx_train: int = self.api.llama_model_n_ctx_train(self._handle)
        adds_bos = self.api.llama_vocab_get_add_bos(self._vocab)
        self.bos: list[int] = [self.api.llama_vocab_bos(self._vocab)] if adds_bos else []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the model; its contexts must be closed before."""
        if self._handle:
            self.api.llama_model_free(self._handle)
            self._handle = None

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text, without `bos`.

        Parameters
        ----------
        text : str
            Any text.
        special : bool
            Whether `<|im_end|>` and its like in the text become the control tokens they name.
        """
        raw = text.encode("utf-8")
        room = len(raw) + 8  # a token is at least a byte, bar the space that some put in front
        buffer = (ctypes.c_int32 * room)()
        count = self.api.llama_tokenize(self._vocab, raw, len(raw), buffer, room, False, special)
        if count < 0:
            raise self.library.failure(f"{self.path}: llama.cpp cannot tokenise {text[:40]!r}")
        return buffer[:count]

    def piece(self, token: int) -> bytes:
        """Bytes that a token stands for; a character may be spread over several tokens."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = self.api.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def is_end(self, token: int) -> bool:
        """Whether a token ends the generation (end of sequence, of turn)."""
        return bool(self.api.llama_vocab_is_eog(self._vocab, token))

    def context(
        self,
        n_ctx: int,
        *,
        n_batch: int,
        n_sequences: int = 1,
        n_outputs: int = 1,
        exact: bool = False,
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
            precision: on the CPU that moves a log-likelihood by up to 4e-3, differently for each
            composition of a batch, where this leaves 1e-6 with float32 weights.
        """
        params = self.api.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = n_batch
        params.n_ubatch = min(n_batch, 512)
        params.n_seq_max = n_sequences
        params.n_outputs_max = max(n_outputs, n_sequences)
        params.n_outputs_max_per_seq = 0  # as many as in all
        params.n_threads = params.n_threads_batch = self.n_threads
        params.kv_unified = (
            True  # a token can then belong to several sequences and is computed once
        )
        if exact:
            params.flash_attn_type = self.api.LLAMA_FLASH_ATTN_TYPE_DISABLED
            params.type_k = params.type_v = self.api.GGML_TYPE_F32
        self.library.log.clear()
        handle = self.api.llama_init_from_model(self._handle, params)
        if not handle:
            raise self.library.failure(f"{self.path}: llama.cpp cannot make a context of {n_ctx}")
        return Context(self, handle)


class Context:
    """Sequences under computation; use it in a `with` statement. Made by `Model.context`."""

    def __init__(self, model: Model, handle: Any) -> None:
        self.model = model
        self.handle = handle
        self._api = model.api

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the context."""
        if self.handle:
            self._api.llama_free(self.handle)
            self.handle = None

    def clear(self) -> None:
        """Forget all sequences."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self.handle), False)

    def decode(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[tuple[int, ...]],
        wanted: Sequence[bool],
    ) -> Float32:
        """Run tokens through the model.

        Parameters
        ----------
        tokens, positions : (n,) int
            Token ids, and the place of each in its sequence.
        sequences : (n,) tuples of int
            The sequences that each token is part of.
        wanted : (n,) bool
            The tokens whose logits are wanted.

        Returns
        -------
        (sum of wanted, n_vocab) float32
            A view that holds until the next call.
        """
        n_tokens = len(tokens)
        token = np.array(tokens, dtype=np.int32)
        position = np.array(positions, dtype=np.int32)
        output = np.array(wanted, dtype=np.int8)
        n_ids = np.array([len(ids) for ids in sequences], dtype=np.int32)
        ids = np.array([one for several in sequences for one in several], dtype=np.int32)
        starts = np.cumsum(n_ids, dtype=np.uint64) - n_ids.astype(np.uint64)
        id_pointers = np.uint64(ids.ctypes.data) + starts * np.uint64(ids.itemsize)

        int32_p = ctypes.POINTER(ctypes.c_int32)
        batch = self._api.llama_batch(
            n_tokens=n_tokens,
            token=token.ctypes.data_as(int32_p),
            pos=position.ctypes.data_as(int32_p),
            n_seq_id=n_ids.ctypes.data_as(int32_p),
            seq_id=id_pointers.ctypes.data_as(ctypes.POINTER(int32_p)),
            logits=output.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        self.model.library.log.clear()
        status = self._api.llama_decode(self.handle, batch)
        if status != 0:
            raise self.model.library.failure(
                f"{self.model.path}: llama.cpp failed on {n_tokens} tokens with status {status}"
            )
        rows = int(output.sum())
        if rows == 0:
            return np.empty((0, self.model.n_vocab), dtype=np.float32)
        logits = self._api.llama_get_logits(self.handle)
        return np.ctypeslib.as_array(logits, shape=(rows, self.model.n_vocab))
