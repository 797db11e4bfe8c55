"""The texts of a vocabulary as llama.cpp sees them, looked up by hash: no list of them is kept in memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator

import numpy as np

from edgemerge.formats.gguf.metadata import iter_strings

__all__ = ["TokenTexts"]


class TokenTexts:
    """Texts by id: which repeat, and which there are.

    262 144 texts take 2 MB here, and 20 MB as a set.

    Parameters
    ----------
    raw : bytes
        Typed value of `tokenizer.ggml.tokens`, an array of strings.
    """

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        hashes = array("q", (hash(text) for text in self.texts()))
        self._hashes = np.frombuffer(hashes, np.int64) if hashes else np.zeros(0, np.int64)
        self._sorted = np.sort(self._hashes)

    def __len__(self) -> int:
        return int(self._hashes.size)

    def texts(self) -> Iterator[bytes]:
        """Yield the texts as `llama_vocab::impl::load` has them.

        They end at the first NUL, as C strings do, and one without a letter gets a name.
        """
        for i, text in enumerate(iter_strings(self._raw)):
            if b"\0" in text:
                text = text[: text.index(b"\0")]
            yield text or b"[EMPTY_%d]" % i

    def has(self, texts: Iterable[bytes]) -> list[bool]:
        """Tell of each text whether it is a token's."""
        wanted = np.array([hash(text) for text in texts], np.int64)
        if not len(self):
            return [False] * wanted.size
        places = np.minimum(np.searchsorted(self._sorted, wanted), len(self) - 1)
        return [bool(is_there) for is_there in self._sorted[places] == wanted]

    def repeated(self) -> dict[bytes, list[int]]:
        """Find the texts that several tokens have: text -> their ids, in order."""
        twice = self._sorted[1:][self._sorted[1:] == self._sorted[:-1]]
        if not twice.size:
            return {}
        suspects = set(np.flatnonzero(np.isin(self._hashes, twice)).tolist())
        ids: dict[bytes, list[int]] = {}
        for i, text in enumerate(self.texts()):
            if i in suspects:
                ids.setdefault(text, []).append(i)
        return {text: found for text, found in ids.items() if len(found) > 1}
