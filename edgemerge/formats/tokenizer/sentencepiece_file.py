"""tokenizer.model, SentencePiece's file: a protobuf message, read by hand.

Of `ModelProto` in sentencepiece_model.proto, field 1 repeats `SentencePiece` (1 piece, 2 score, 3
type), field 2 is `TrainerSpec` (3 model_type) and field 3 `NormalizerSpec` (2 precompiled_charsmap, 3
add_dummy_prefix, 4 remove_extra_whitespaces). Nothing else of it is needed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from edgemerge.errors import FormatError
from edgemerge.formats.files import describe_foreign, read_bounded

__all__ = [
    "BYTE",
    "CONTROL",
    "NORMAL",
    "UNKNOWN",
    "UNUSED",
    "USER_DEFINED",
    "SentencePieceFile",
    "read_sentencepiece",
    "write_sentencepiece",
]

# Types of a piece; llama_token_type of llama.cpp has the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
MAX_MODEL_BYTES = 100_000_000
Field = tuple[int, int | float | bytes]


@dataclass(frozen=True, slots=True)
class SentencePieceFile:
    """What tokenizer.model says."""

    pieces: tuple[tuple[bytes, float, int], ...]  # text, score, type
    is_unigram: bool  # else its scores are ranks of merges
    charsmap: bytes  # how characters are normalised; empty: not at all
    adds_space: bool  # in front of a text
    removes_spaces: bool  # of several in a row all but one, and those at the ends


def read_sentencepiece(path: Path) -> SentencePieceFile:
    """Read a tokenizer.model.

    Raises
    ------
    FormatError
        It cannot be read, is something else, or is damaged.
    """
    raw = read_bounded(path, MAX_MODEL_BYTES)
    if raw[:1] != b"\n":  # the tag of field 1, always first
        raise FormatError(describe_foreign(raw[:64], "SentencePiece"), path=path)
    try:
        return _parse(raw)
    except (IndexError, UnicodeDecodeError, ValueError, struct.error) as e:
        raise FormatError(
            f"is not a SentencePiece model, or a damaged one ({e}); get the file again", path=path
        ) from e


def _parse(raw: bytes) -> SentencePieceFile:
    pieces = []
    trainer: dict[int, int | float | bytes] = {}
    normalizer: dict[int, int | float | bytes] = {}
    for number, value in _fields(raw):
        if number == 1 and isinstance(value, bytes):
            pieces.append(_parse_piece(value))
        elif number == 2 and isinstance(value, bytes):
            trainer |= dict(_fields(value))  # a message that comes twice is merged: protobuf's rule
        elif number == 3 and isinstance(value, bytes):
            normalizer |= dict(_fields(value))
    charsmap = normalizer.get(2, b"")
    return SentencePieceFile(
        pieces=tuple(pieces),
        # Files without a trainer are taken for BPE, as llama.cpp's converter takes all files.
        is_unigram=trainer.get(3, UNIGRAM if trainer else BPE) == UNIGRAM,
        charsmap=charsmap if isinstance(charsmap, bytes) else b"",
        adds_space=bool(normalizer.get(3, True)),
        removes_spaces=bool(normalizer.get(4, True)),
    )


def _parse_piece(message: bytes) -> tuple[bytes, float, int]:
    piece, score, kind = b"", 0.0, NORMAL
    for number, value in _fields(message):
        if number == 1 and isinstance(value, bytes):
            piece = value
        elif number == 2 and isinstance(value, float):
            score = value
        elif number == 3 and isinstance(value, int):
            kind = value
    piece.decode("utf-8")
    if not NORMAL <= kind <= BYTE:
        raise ValueError(f"a piece has type {kind}")
    return piece, score, kind


def _fields(message: bytes) -> Iterator[Field]:
    """Yield (field number, value) of one protobuf message; 64-bit values are skipped."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        match tag & 7:
            case 0:
                value, at = _varint(message, at)
                yield tag >> 3, value
            case 1:
                at += 8
            case 2:
                length, at = _varint(message, at)
                if length > len(message) - at:
                    raise ValueError("a field is longer than the file")
                yield tag >> 3, message[at : at + length]
                at += length
            case 5:
                yield tag >> 3, struct.unpack_from("<f", message, at)[0]
                at += 4
            case kind:
                raise ValueError(f"wire type {kind} is not used by SentencePiece")
    if at > len(message):
        raise ValueError("the last field is cut short")


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number has more than ten bytes")


def write_sentencepiece(pieces: Iterable[tuple[bytes, float, int]], *, adds_space: bool) -> bytes:
    """Return a tokenizer.model of SentencePiece's BPE, as `read_sentencepiece` reads it.

    Parameters
    ----------
    pieces : iterable of (text, score, type)
        By id.
    adds_space : bool
        Whether a space is put in front of a text.
    """
    message = bytearray()
    for text, score, kind in pieces:
        piece = _length_field(1, text) + b"\x15" + struct.pack("<f", score)
        message += _length_field(1, piece + (b"" if kind == NORMAL else bytes([0x18, kind])))
    message += _length_field(2, bytes([0x18, BPE, 0x98, 0x02, 1]))  # 35 byte_fallback
    # Characters are not normalised, and no space is removed.
    message += _length_field(3, b"\x0a\x08identity" + bytes([0x18, adds_space, 0x20, 0]))
    return bytes(message)


def _length_field(number: int, value: bytes) -> bytes:
    length, raw = len(value), bytearray([number << 3 | 2])
    while length > 0x7F:
        raw.append(length & 0x7F | 0x80)
        length >>= 7
    raw.append(length)
    return bytes(raw) + value
