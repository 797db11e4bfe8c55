"""Vocabularies with more tokens than one model has: unions, tokens that a recipe adds, padding.

All of it is done on GGUF's metadata, so that directories and GGUF files are alike. The tokens of the first
model keep their ids. Then come the normal tokens that only others have, then those that were added to these
vocabularies, each in the order of the models and of their ids (mergekit tokenizer/build.py,
`build_union_tokenizer`). There, all new tokens are matched as whole texts. Here a normal token keeps the
score or the merges by which its own model makes it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from edgemerge.formats.gguf.metadata import encode_value, iter_strings, value_kind
from edgemerge.formats.tokenizer.sentencepiece_file import CONTROL, NORMAL, UNUSED, USER_DEFINED
from edgemerge.formats.tokenizer.spm import ADDED_SCORE, PAD_SCORE, looks_special, user_text
from edgemerge.formats.tokenizer.table import (
    TOKENS_KEY,
    TYPES_KEY,
    TokenTable,
    TokenTables,
    text_key,
)

__all__ = ["ADDED", "UNITABLE", "Extension", "NewToken", "added_token"]

MODEL_KEY, MERGES_KEY, SCORES_KEY = (
    f"tokenizer.ggml.{key}" for key in ("model", "merges", "scores")
)
UNITABLE = {"gpt2": "byte-level BPE", "llama": "SentencePiece", "t5": "Unigram"}
ADDED = (CONTROL, USER_DEFINED)


class NewToken(NamedTuple):
    """A token that a vocabulary gets."""

    text: bytes
    type: int
    score: float


def added_token(text: str) -> NewToken:
    """Return the token of a text that a recipe names, as llama.cpp's converter has an added token."""
    if looks_special(text):
        return NewToken(text.encode(), CONTROL, ADDED_SCORE)
    return NewToken(user_text(text).encode(), USER_DEFINED, ADDED_SCORE)


class Extension:
    """A vocabulary to which tokens are added.

    Parameters
    ----------
    metadata : mapping of GGUF key to typed value
        Of the model whose tokens come first; its padding is left out.
    tables : TokenTables
        Where tables of vocabularies are made and kept.
    """

    def __init__(self, metadata: Mapping[str, bytes], tables: TokenTables) -> None:
        self._metadata = {k: v for k, v in metadata.items() if k.startswith("tokenizer.")}
        self._tables = tables
        self._table = tables.of(metadata)
        self._n_first = self._table.n_named
        self._retyped: dict[int, int] = {}  # id -> type
        self._new: list[NewToken] = []
        self._ids: dict[int, int] = {}  # text_key of a new token -> id
        self._merges: list[bytes] = []

    def __len__(self) -> int:
        return self._n_first + len(self._new)

    def find(self, text: bytes) -> int | None:
        """Return the id of a token, None where there is no such token."""
        found = self._table.find_text(text)
        if found is None or found >= self._n_first:
            return self._ids.get(text_key(text))
        return found

    def add(self, token: NewToken) -> int:
        """Add a token, and return its id."""
        self._ids[text_key(token.text)] = len(self)
        self._new.append(token)
        return len(self) - 1

    def join(self, others: Sequence[Mapping[str, bytes]]) -> list[int]:
        """Add all tokens that others have; return how many each of them brought."""
        tables = [self._tables.of(other) for other in others]
        unknown = [np.flatnonzero(self._find(table) < 0).tolist() for table in tables]
        is_added = {
            int(table.keys[i])
            for table, ids in zip(tables, unknown, strict=True)
            for i in ids
            if table.types[i] in ADDED
        }
        brought = [0] * len(others)
        for adding in (False, True):
            for n, (other, table, ids) in enumerate(zip(others, tables, unknown, strict=True)):
                scores = _scores(other)
                texts = []
                for i in ids:
                    key = int(table.keys[i])
                    if key in self._ids or (key in is_added) != adding or table.is_padding(i):
                        continue
                    if adding and table.types[i] not in ADDED:
                        continue  # added to another vocabulary, which says how
                    score = ADDED_SCORE if scores is None or i >= scores.size else float(scores[i])
                    self.add(NewToken(table.text(i), int(table.types[i]), score))
                    texts.append(table.text(i))
                    brought[n] += 1
                if not adding and texts:
                    self._merges += self._merges_of(other, {text_key(text) for text in texts})
        for table in tables:
            self._retype(table)
        return brought

    def _find(self, table: TokenTable) -> np.ndarray:
        """Find another vocabulary's tokens among the first model's."""
        found = self._table.find(table.keys)
        return np.where(found < self._n_first, found, -1)

    def _retype(self, table: TokenTable) -> None:
        """Take over that a normal token of the first model was added to another vocabulary."""
        found = self._find(table)
        ids = np.flatnonzero((found >= 0) & np.isin(table.types, ADDED))
        for i in ids[self._table.types[found[ids]] == NORMAL].tolist():
            if table.text(i) == self._table.text(int(found[i])):
                self._retyped.setdefault(int(found[i]), int(table.types[i]))

    def _merges_of(self, metadata: Mapping[str, bytes], made: set[int]) -> Iterator[bytes]:
        """Yield the merges of a byte-level BPE that make new tokens of tokens that there are."""
        raw = metadata.get(MERGES_KEY)
        for merge in iter_strings(raw) if raw is not None else ():
            left, _, right = merge.partition(b" ")
            if text_key(left + right) in made and None not in (self.find(left), self.find(right)):
                yield merge

    def pad(self, multiple: int) -> int:
        """Fill the vocabulary up with tokens without a text, and return how many these are."""
        n_padding = -len(self) % multiple
        for i in range(len(self), len(self) + n_padding):
            self.add(NewToken(b"[PAD%d]" % i, UNUSED, PAD_SCORE))
        return n_padding

    def metadata(self) -> dict[str, bytes]:
        """Return the `tokenizer.` keys; as they were where nothing was added or left out."""
        found = dict(self._metadata)
        if not self._new and not self._retyped and self._n_first == len(self._table):
            return found
        tokens, types, scores = self._new, self._table.types[: self._n_first].copy(), _scores(found)
        for i, kind in self._retyped.items():
            types[i] = kind
        texts = b"".join(struct.pack("<Q", len(t.text)) + t.text for t in tokens)
        head = found[TOKENS_KEY][:8] + struct.pack("<Q", len(self))
        found[TOKENS_KEY] = head + self._table.encoded(self._n_first) + texts
        found[TYPES_KEY] = encode_value([*types.tolist(), *(t.type for t in tokens)], "[i32]")
        if scores is not None:
            kept = np.full(self._n_first, ADDED_SCORE, np.float32)
            kept[: scores.size] = scores[: self._n_first]
            new = np.array([t.score for t in tokens], np.float32)
            head = encode_value([], "[f32]")[:8] + struct.pack("<Q", len(self))
            found[SCORES_KEY] = head + np.concatenate([kept, new]).astype("<f4").tobytes()
        if self._merges and MERGES_KEY in found:
            raw = found[MERGES_KEY]
            count = int.from_bytes(raw[8:16], "little") + len(self._merges)
            more = b"".join(struct.pack("<Q", len(merge)) + merge for merge in self._merges)
            found[MERGES_KEY] = raw[:8] + struct.pack("<Q", count) + raw[16:] + more
        return found


def _scores(metadata: Mapping[str, bytes]) -> np.ndarray | None:
    raw = metadata.get(SCORES_KEY)
    if raw is None or value_kind(raw) != "[f32]":
        return None
    return np.frombuffer(raw, "<f4", offset=16)
