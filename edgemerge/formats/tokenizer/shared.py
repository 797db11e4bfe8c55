"""Which tokens two vocabularies have in common, though they may spell them differently.

A normal token counts by the bytes that it stands for. Tokens that begin, end, pad or stand for the unknown
count by what they do (mergekit tokenizer/normalization.py, `normalize_token`). Tokens of single bytes, as
SentencePiece has them beside its letters, count among themselves.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edgemerge.formats.gguf.metadata import get_value
from edgemerge.formats.tokenizer.extend import ADDED, MODEL_KEY
from edgemerge.formats.tokenizer.table import TokenTable

__all__ = ["find_shared"]

Int64 = NDArray[np.int64]
Int32 = NDArray[np.int32]

ROLES = ("bos", "eos", "unknown", "padding")  # the first counts where a token has several
BYTE = 6  # GGUF's type of a token of one byte
BYTE_LEVEL = "gpt2"
SPACE = "\u2581".encode()
PRINTED = (range(0x21, 0x7F), range(0xA1, 0xAD), range(0xAE, 0x100))


def find_shared(wanted: Mapping[str, bytes], other: Mapping[str, bytes]) -> Int32:
    """Find each token of a vocabulary in another: its id there, or -1; the first where several are alike.

    Parameters
    ----------
    wanted, other : mapping of GGUF key to typed value
        Of models with byte-level BPE, SentencePiece or Unigram vocabularies.

    Returns
    -------
    int32 array (n_tokens of `wanted`,)
    """
    theirs, first = np.unique(_keys(other), return_index=True)
    keys = _keys(wanted)
    if not theirs.size:
        return np.full(keys.size, -1, np.int32)
    places = np.minimum(np.searchsorted(theirs, keys), theirs.size - 1)
    found = np.where(theirs[places] == keys, first[places], -1).astype(np.int32)
    for role in reversed(ROLES):
        ours, its = (get_value(one, f"tokenizer.ggml.{role}_token_id") for one in (wanted, other))
        if isinstance(ours, int) and isinstance(its, int) and 0 <= ours < keys.size and its >= 0:
            found[ours] = its
    return found


def _keys(metadata: Mapping[str, bytes]) -> Int64:
    """Hash what each token stands for."""
    table = TokenTable(metadata)
    is_byte_level = get_value(metadata, MODEL_KEY) == BYTE_LEVEL
    letters = _letters()
    keys = array("q")
    for i, kind in enumerate(table.types.tolist()):
        text = table.text(i)
        if kind == BYTE:
            keys.append(hash(("byte", text)))
        elif is_byte_level and kind not in ADDED:
            keys.append(hash(_spelled(text, letters)))
        else:
            keys.append(hash(text.replace(SPACE, b" ")))
    return np.array(keys, np.int64)


def _spelled(text: bytes, letters: Mapping[str, int]) -> bytes:
    """Return the bytes of a byte-level token; of one with other letters, the text itself."""
    decoded = text.decode("utf-8", "replace")
    found = [letters.get(letter) for letter in decoded]
    return text if None in found else bytes(byte for byte in found if byte is not None)


def _letters() -> dict[str, int]:
    """Map the letters that byte-level BPE writes for bytes (GPT-2 encoder.py, `bytes_to_unicode`)."""
    printed = [byte for part in PRINTED for byte in part]
    others = [byte for byte in range(256) if byte not in printed]
    letters = {chr(byte): byte for byte in printed}
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}
