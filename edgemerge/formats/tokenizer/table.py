"""A vocabulary as GGUF's metadata has it, with its tokens looked up by their texts."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edgemerge.formats.gguf.metadata import iter_strings, value_kind
from edgemerge.formats.tokenizer.sentencepiece_file import CONTROL, NORMAL, UNUSED

__all__ = ["TOKENS_KEY", "TYPES_KEY", "TokenTable", "TokenTables", "cut_alike", "text_key"]

TOKENS_KEY, TYPES_KEY = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
SCORES_KEY = "tokenizer.ggml.scores"  # by which SentencePiece and Unigram choose tokens
CUTTING: tuple[str, ...] = ("model", "pre", "merges", "add_space_prefix")
CUTTING += ("remove_extra_whitespaces", "precompiled_charsmap")

Int64 = NDArray[np.int64]
Int32 = NDArray[np.int32]


def text_key(text: bytes) -> int:
    """Hash a token's text. GGUF spells a space of an added token as such, and of other tokens as U+2581."""
    return hash(text.replace(b" ", b"\xe2\x96\x81"))


class TokenTable:
    """Tokens by id and by text. 262 144 of them take 8 MB, and 20 MB as a dictionary.

    Parameters
    ----------
    metadata : mapping of GGUF key to typed value
        Of a model with a vocabulary.

    Attributes
    ----------
    keys : int64 array (n_tokens,)
        `text_key` of each token.
    types : int32 array (n_tokens,)
        GGUF's types of tokens; all are normal where the model does not say.
    n_named : int
        Tokens without the padding at the end, which has no texts of its own: `[PADn]`.
    """

    def __init__(self, metadata: Mapping[str, bytes]) -> None:
        self.raw = metadata[TOKENS_KEY]
        keys, lengths = array("q"), array("q")
        for text in iter_strings(self.raw):
            keys.append(text_key(text))
            lengths.append(len(text))
        self.keys: Int64 = np.array(keys, np.int64)
        self._ends: Int64 = 16 + np.concatenate([[0], np.cumsum(8 + np.array(lengths, np.int64))])
        stated = metadata.get(TYPES_KEY)
        self.types: Int32 = np.full(len(keys), NORMAL, np.int32)
        if stated is not None and value_kind(stated) in ("[i32]", "[u32]"):
            found = np.frombuffer(stated, "<i4", offset=16)[: len(keys)]
            self.types[: found.size] = found
        self.n_named = len(keys)
        while self.n_named and self.is_padding(self.n_named - 1):
            self.n_named -= 1
        self._order = np.argsort(self.keys, kind="stable")
        self._sorted = self.keys[self._order]

    def __len__(self) -> int:
        return int(self.keys.size)

    def text(self, i: int) -> bytes:
        """Return a token's text."""
        return self.raw[int(self._ends[i]) + 8 : int(self._ends[i + 1])]

    def is_padding(self, i: int) -> bool:
        """Tell whether a token only fills up the rows of the embedding."""
        return bool(self.types[i] == UNUSED) and self.text(i) == b"[PAD%d]" % i

    def encoded(self, n_tokens: int) -> bytes:
        """Return the first tokens as GGUF's strings, one after the other."""
        return self.raw[16 : int(self._ends[n_tokens])]

    def find(self, keys: Int64) -> Int32:
        """Look tokens up by `text_key`: of each the id, -1 where there is none.

        Where a text repeats, it is the id of the same number, else the first.
        """
        if not len(self):
            return np.full(keys.size, -1, np.int32)
        places = np.minimum(np.searchsorted(self._sorted, keys), len(self) - 1)
        found = np.where(self._sorted[places] == keys, self._order[places], -1).astype(np.int32)
        n_both = min(keys.size, len(self))
        same = np.flatnonzero(keys[:n_both] == self.keys[:n_both])
        found[same] = same
        return found

    def find_text(self, text: bytes) -> int | None:
        """Return the id of a text; None where there is none."""
        place = int(np.searchsorted(self._sorted, text_key(text)))
        found = place < len(self) and self._sorted[place] == text_key(text)
        return int(self._order[place]) if found else None


class TokenTables:
    """Tables of several models; those whose vocabularies are equal, as fine-tunes have them, use one."""

    def __init__(self) -> None:
        self._made: dict[tuple[bytes | None, bytes | None], TokenTable] = {}

    def of(self, metadata: Mapping[str, bytes]) -> TokenTable:
        """Return the table of a model with a vocabulary."""
        key = metadata.get(TOKENS_KEY), metadata.get(TYPES_KEY)
        if key not in self._made:
            self._made[key] = TokenTable(metadata)
        return self._made[key]


def cut_alike(first: Mapping[str, bytes], second: Mapping[str, bytes]) -> bool:
    """Tell whether two vocabularies cut plain text into the same tokens, by what their metadata states.

    Control tokens and padding may differ: no plain text becomes one.
    """
    common = [f"tokenizer.ggml.{key}" for key in CUTTING]
    if any(first.get(key) != second.get(key) for key in common):
        return False
    if all(first.get(key) == second.get(key) for key in (TOKENS_KEY, TYPES_KEY, SCORES_KEY)):
        return True
    return _hash_plain(first) == _hash_plain(second)


def _hash_plain(metadata: Mapping[str, bytes]) -> bytes:
    """Hash the tokens that plain text may become, with their ids, types and scores."""
    digest = hashlib.sha256()
    if value_kind(metadata.get(TOKENS_KEY, b"")) != "[str]":
        return digest.digest()
    table, scores = TokenTable(metadata), metadata.get(SCORES_KEY, b"")[16:]
    for i, kind in enumerate(table.types.tolist()):
        if kind not in (CONTROL, UNUSED):
            text = table.text(i)
            digest.update(b"%d %d %d %b" % (i, kind, len(text), text))
            digest.update(scores[4 * i : 4 * i + 4])
    return digest.digest()
