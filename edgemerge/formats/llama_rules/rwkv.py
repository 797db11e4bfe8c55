"""RWKV's vocabulary, whose tokenizer does not always come to an end."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["stuck_byte"]

_ESCAPE = re.compile(rb"\\(x..|.)", re.DOTALL)
_LETTERS = {b"t": b"\t", b"n": b"\n", b"r": b"\r"}


def stuck_byte(texts: Iterable[bytes]) -> int | None:
    """Find a byte that begins a token and is none.

    Where a text has it and the token does not follow, `llm_tokenizer_rwkv_session` goes back to the
    start of the text, for ever.

    Parameters
    ----------
    texts : iterable of bytes
        All tokens, escaped as `llama_unescape_rwkv_token` reads them.
    """
    begins: set[int] = set()
    whole: set[int] = set()
    for text in texts:
        token = _ESCAPE.sub(_unescape, text)
        begins.update(token[:1])
        if len(token) == 1:
            whole.update(token)
    return min(begins - whole, default=None)


def _unescape(match: re.Match[bytes]) -> bytes:
    code = match[1]
    if code[:1] == b"x" and len(code) == 3:
        high, low = (_digit(byte) for byte in code[1:])
        return bytes([(high << 4) + low & 0xFF])
    return _LETTERS.get(code, code)


def _digit(byte: int) -> int:
    return byte - ord("a") + 10 if byte >= ord("a") else byte - ord("0")
