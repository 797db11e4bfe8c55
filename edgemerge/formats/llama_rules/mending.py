"""Metadata as llama.cpp takes it: what can be mended without guessing is, and said."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edgemerge.formats.gguf.metadata import (
    ARRAY_HEAD,
    SCALARS,
    Array,
    array_head,
    decode_value,
    encode_value,
    get_value,
    value_kind,
)
from edgemerge.formats.llama_rules.token_texts import TokenTexts
from edgemerge.formats.llama_rules.vocabulary import (
    KINDS,
    MODEL_KEY,
    NAME_KEY,
    PHI3_TEXTS,
    SPECIAL_KEYS,
    TOKENS_KEY,
    TYPES_KEY,
    adds_nothing,
    names_phi3,
)

__all__ = ["mend_metadata"]

CONTROL, UNUSED = 3, 5  # LLAMA_TOKEN_TYPE_… of include/llama.h
_NO_TYPES = np.zeros(0, np.int32)


def mend_metadata(metadata: Mapping[str, bytes]) -> tuple[dict[str, bytes], list[str]]:
    """Make of a model's metadata what llama.cpp loads.

    - Keys of the tokenizer get the types that llama.cpp reads; an id of -1 stood for none, and goes.
    - Of tokens with one text, one keeps it; the others become `[PADn]` of type UNUSED, as llama.cpp's
      converter fills up a vocabulary.
    - What would be added to every text and is not named is no longer added.
    - A model that is called phi3 and has other tokens gets another name.

    Parameters
    ----------
    metadata : mapping of GGUF key to typed value
        Of the whole model.

    Returns
    -------
    metadata : dict
        In the same order; equal to what was given where nothing was wrong.
    notes : list of str
        One sentence for each change.
    """
    mended, notes = dict(metadata), list[str]()
    _mend_kinds(mended, notes)
    raw = mended.get(TOKENS_KEY)
    if raw is None or value_kind(raw) != "[str]":
        return mended, notes
    _mend_repeated(mended, notes)
    for name in adds_nothing(mended, n_tokens := _count(raw)):
        if get_value(mended, MODEL_KEY) != "bert":
            mended[f"tokenizer.ggml.add_{name}_token"] = encode_value(False, "bool")
            notes.append(
                f"add_{name}_token is now false: the model names no {name} token of its {n_tokens}"
            )
    if names_phi3(mended) and not all(TokenTexts(mended[TOKENS_KEY]).has(PHI3_TEXTS)):
        name = re.sub(r"(?i)(phi)-?3", r"\1_3", str(get_value(mended, NAME_KEY)))
        mended[NAME_KEY] = encode_value(name, "str")
        notes.append(
            f"general.name is {name}: of a model called phi3, llama.cpp wants Phi-3's tokens"
        )
    return mended, notes


def _count(raw: bytes) -> int:
    return int.from_bytes(raw[8:16], "little")


def _mend_kinds(mended: dict[str, bytes], notes: list[str]) -> None:
    for key, kinds in KINDS.items():
        if key not in mended or (kind := value_kind(mended[key])) in kinds:
            continue
        value = decode_value(mended[key])
        if kinds[0] == "u32" and isinstance(value, int) and value < 0:
            del mended[key]
            notes.append(f"{key} of {value} is left out: it stands for none")
            continue
        try:
            if isinstance(value, Array) and kinds[0].startswith("["):
                mended[key] = _as_numbers(mended, key, kinds[0])
            else:
                mended[key] = encode_value(_as_kind(value, kinds[0]), kinds[0])
        except (struct.error, TypeError, ValueError, OverflowError, AssertionError):
            continue  # a text, say; that is found again, and refused
        notes.append(f"{key} is written as {kinds[0]}, not {kind}, which llama.cpp does not read")


def _as_numbers(metadata: Mapping[str, bytes], key: str, kind: str) -> bytes:
    """Convert an array of a number for each token: to [f32] as nearly as it can be, to [i32] exactly.

    A longer one may be 48 MB of small numbers. It is no array of a vocabulary.
    """
    old, new = value_kind(metadata[key])[1:-1], kind[1:-1]
    texts = metadata.get(TOKENS_KEY, b"")
    n_tokens = _count(texts) if texts and value_kind(texts) == "[str]" else 0
    if old not in SCALARS or _count(metadata[key]) > n_tokens:
        raise ValueError(f"{key} is no array of numbers for {n_tokens} tokens")
    numbers = np.frombuffer(metadata[key], SCALARS[old][1], offset=ARRAY_HEAD)
    with np.errstate(over="ignore", invalid="ignore"):
        converted = numbers.astype(SCALARS[new][1])
    if new == "i32" and not np.array_equal(converted, numbers):
        raise ValueError(f"{key} holds other numbers than {new}")
    if not np.array_equal(np.isinf(converted), np.isinf(numbers)):
        raise OverflowError(f"{key} holds numbers that are too large for {new}")
    return array_head(new, numbers.size) + converted.tobytes()


def _as_kind(value: object, kind: str) -> int | float | bool:
    """Convert a value, exactly or not at all."""
    if kind == "bool" and value in (0, 1):
        return bool(value)
    if kind == "u32" and isinstance(value, int | float) and math.floor(value) == value:
        return int(value)
    raise ValueError(f"{value!r} is no {kind}")


def _mend_repeated(mended: dict[str, bytes], notes: list[str]) -> None:
    texts = TokenTexts(mended[TOKENS_KEY])
    repeated = texts.repeated()
    if not repeated:
        return
    special = [get_value(mended, key) for key in SPECIAL_KEYS.values()]
    named = {token for token in special if isinstance(token, int)}
    raw = mended.get(TYPES_KEY, b"")
    has_types = bool(raw) and value_kind(raw) == "[i32]"
    types = np.frombuffer(raw, "<i4", offset=ARRAY_HEAD).copy() if has_types else _NO_TYPES
    renamed: dict[int, bytes] = {}
    for ids in repeated.values():
        keeper = min(ids, key=lambda i: (i not in named, _rank(types, i), i))
        renamed |= {i: _free_name(texts, i) for i in ids if i != keeper}
    mended[TOKENS_KEY] = _replace_texts(mended[TOKENS_KEY], renamed)
    if has_types:
        types[[i for i in renamed if i < types.size]] = UNUSED
        mended[TYPES_KEY] = raw[:ARRAY_HEAD] + types.tobytes()
    text, ids = next(iter(repeated.items()))
    first = min(renamed)
    more = f", and {len(renamed) - 1} more" if len(renamed) > 1 else ""
    notes.append(
        f"token {first} is now {renamed[first].decode()}{more}: llama.cpp wants every text once, and "
        f"{text.decode('utf-8', 'replace')!r} stood under {len(ids)} ids"
    )


def _rank(types: NDArray[np.int32], i: int) -> int:
    """Whose text a model is more likely to write: control tokens, then all others, then unused ones."""
    return {CONTROL: 0, UNUSED: 2}.get(int(types[i]), 1) if i < types.size else 1


def _free_name(texts: TokenTexts, i: int) -> bytes:
    name = b"[PAD%d]" % i
    while texts.has([name])[0]:
        name = name[:-1] + b"_]"
    return name


def _replace_texts(raw: bytes, renamed: Mapping[int, bytes]) -> bytes:
    """Write an array of strings with other items at some places; the rest stays as it is."""
    pieces, at, start = [raw[:16]], 16, 16
    for i in range(_count(raw)):
        (length,) = struct.unpack_from("<Q", raw, at)
        end = at + 8 + length
        if i in renamed:
            pieces += [raw[start:at], struct.pack("<Q", len(renamed[i])), renamed[i]]
            start = end
        at = end
    return b"".join([*pieces, raw[start:]])
