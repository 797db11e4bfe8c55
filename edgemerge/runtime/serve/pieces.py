"""Tokens to text: each piece is read from llama.cpp once."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from edgemerge.runtime.library import load_library

_api = load_library().api  # before llama_cpp itself, whose log it takes over
from llama_cpp import BaseLlamaTokenizer, Llama  # noqa: E402

__all__ = ["Pieces"]


class Pieces(BaseLlamaTokenizer):  # type: ignore[misc]
    """Tokens to text and back.

    llama-cpp-python loses pieces of more than 32 bytes, asks llama.cpp again for each token of the
    answer at each new one, and sets room aside for as many tokens as the header says it was trained on.
    """

    def __init__(self, llama: Llama) -> None:
        self._model = llama._model
        self._known: dict[int, bytes] = {}

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = True) -> list[int]:
        """Token ids of a text."""
        room = (
            len(text) + 8
        )  # a token is at least a byte, but a table of characters may make more of them
        while True:
            buffer = (ctypes.c_int32 * room)()
            vocab = self._model.vocab
            count = _api.llama_tokenize(vocab, text, len(text), buffer, room, add_bos, special)
            if count >= 0:
                return buffer[:count]
            room = -count

    def detokenize(
        self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None, special: bool = False
    ) -> bytes:
        """Bytes that tokens stand for; those before them do not matter."""
        text = b"".join(self.piece(token) for token in tokens)
        # sentencepiece puts a space before the first word of a text
        at_start = not prev_tokens and tokens and tokens[0] == self._model.token_bos()
        return text.removeprefix(b" ") if at_start else text

    def piece(self, token: int) -> bytes:
        """Bytes of one token; control tokens have none."""
        if token not in self._known:
            self._known[token] = self._read(token)
        return self._known[token]

    def _read(self, token: int) -> bytes:
        n_vocab = self._model.n_vocab()
        if not 0 <= token < n_vocab:  # llama.cpp would end the process
            raise ValueError(f"a token is not 0 to {n_vocab - 1}")
        size = 32
        while True:
            buffer = ctypes.create_string_buffer(size)
            count: int = _api.llama_token_to_piece(self._model.vocab, token, buffer, size, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            size = -count
