"""GGUF's typed key-value pairs, as bytes.

A value is kept exactly as GGUF stores it: a little-endian u32 type, then the payload. So what we do not
need to understand (a vocabulary of 262 000 tokens, a chat template) passes from input to output
unchanged, without a Python object per token. An array stays bytes even when its value is asked for
(`Array`). Format: ggml/docs/gguf.md, `gguf_metadata_value_t`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeAlias, overload

__all__ = ["ARRAY_HEAD", "SCALARS", "TYPE_IDS", "Array", "Value", "array_head", "decode_value"]
__all__ += ["encode_value", "get_value", "iter_strings", "value_kind"]

Scalar: TypeAlias = int | float | bool | str

# GGUF type name -> (type id, struct format); strings and arrays have a payload of their own.
SCALARS: dict[str, tuple[int, str]] = {
    "u8": (0, "<B"),
    "i8": (1, "<b"),
    "u16": (2, "<H"),
    "i16": (3, "<h"),
    "u32": (4, "<I"),
    "i32": (5, "<i"),
    "f32": (6, "<f"),
    "bool": (7, "<?"),
    "u64": (10, "<Q"),
    "i64": (11, "<q"),
    "f64": (12, "<d"),
}
STRING, ARRAY = 8, 9
ARRAY_HEAD = 16  # bytes before the items of an array
SHOWN = 4  # items of an array in a sentence
TYPE_IDS: dict[str, int] = {name: type_id for name, (type_id, _) in SCALARS.items()} | {
    "str": STRING
}
_FORMATS = {type_id: fmt for type_id, fmt in SCALARS.values()}


def encode_value(value: Scalar | bytes | Sequence[Scalar | bytes], kind: str) -> bytes:
    """Encode a value as GGUF stores it, type first.

    Parameters
    ----------
    value : scalar, str, bytes or a sequence of them
        bytes stand for a string that need not be UTF-8 (tokens).
    kind : str
        A key of `TYPE_IDS`, or one in brackets for an array: `"u32"`, `"[str]"`.
    """
    if kind.startswith("["):
        element = kind[1:-1]
        assert isinstance(value, Sequence)
        assert not isinstance(value, str | bytes)
        head = array_head(element, len(value))
        if element == "str":
            return head + b"".join(_payload(item, "str") for item in value)
        return head + struct.pack(f"<{len(value)}{SCALARS[element][1][1]}", *value)
    assert isinstance(value, str | bytes | int | float)
    return struct.pack("<I", TYPE_IDS[kind]) + _payload(value, kind)


def array_head(element: str, length: int) -> bytes:
    """Encode what stands before the items of an array, of the type of that name."""
    return struct.pack("<IIQ", ARRAY, TYPE_IDS[element], length)


def _payload(value: Scalar | bytes, kind: str) -> bytes:
    if kind == "str":
        raw = value.encode("utf-8") if isinstance(value, str) else value
        assert isinstance(raw, bytes)
        return struct.pack("<Q", len(raw)) + raw
    return struct.pack(SCALARS[kind][1], value)


class Array(Sequence[Scalar]):
    """An array's items, made from its bytes one at a time.

    A stranger's file may have 48 MB of numbers where a word is expected. As a list they would take 16 times
    as much, before anybody sees that it is no word.

    Parameters
    ----------
    raw : bytes
        What `encode_value` or a checked GGUF header gave for an array.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._type, self._length = struct.unpack_from("<IQ", raw, 4)

    @property
    def is_text(self) -> bool:
        """Whether the items are strings."""
        return bool(self._type == STRING)

    def __len__(self) -> int:
        return int(self._length)

    def __iter__(self) -> Iterator[Scalar]:
        if not self.is_text:
            items = struct.iter_unpack(_FORMATS[self._type], memoryview(self._raw)[16:])
            return (item for (item,) in items)
        return self._texts()

    def _texts(self) -> Iterator[str]:
        at = 16
        for _ in range(self._length):
            (length,) = struct.unpack_from("<Q", self._raw, at)
            yield self._raw[at + 8 : at + 8 + length].decode("utf-8", "replace")
            at += 8 + length

    @overload
    def __getitem__(self, i: int) -> Scalar: ...
    @overload
    def __getitem__(self, i: slice) -> list[Scalar]: ...
    def __getitem__(self, i: int | slice) -> Scalar | list[Scalar]:
        """Return an item, or a list of some; to find a string takes a walk over those before it."""
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        if self.is_text:
            return next(islice(self, i, None))
        fmt = _FORMATS[self._type]
        item: Scalar = struct.unpack_from(fmt, self._raw, 16 + i * struct.calcsize(fmt))[0]
        return item

    def __eq__(self, other: Any) -> bool:
        if isinstance(other, Array) and self._raw == other._raw:
            return True
        if not isinstance(other, Array | list) or len(self) != len(other):
            return False
        return all(left == right for left, right in zip(self, other, strict=True))

    def __repr__(self) -> str:
        shown = ", ".join(repr(item) for item in self[:SHOWN])
        return f"[{shown}]" if len(self) <= SHOWN else f"[{shown}, …] ({len(self)} values)"


Value: TypeAlias = Scalar | Array


def decode_value(raw: bytes) -> Value:
    """Decode one typed value that `encode_value` or a checked GGUF header gave; bad UTF-8 is replaced."""
    type_id = struct.unpack_from("<I", raw)[0]
    if type_id == ARRAY:
        return Array(raw)
    if type_id == STRING:
        return raw[12:].decode("utf-8", "replace")
    scalar: Scalar = struct.unpack_from(_FORMATS[type_id], raw, 4)[0]
    return scalar


def get_value(
    metadata: Mapping[str, bytes], key: str, default: Value | None = None
) -> Value | None:
    """Return one decoded value of a model's metadata, or `default` where the key is absent."""
    raw = metadata.get(key)
    return default if raw is None else decode_value(raw)


def value_kind(raw: bytes) -> str:
    """Name the type of a typed value as `encode_value` does: `"u32"`, `"[str]"`."""
    names = {type_id: name for name, type_id in TYPE_IDS.items()}
    type_id = int.from_bytes(raw[:4], "little")
    if type_id != ARRAY:
        return names[type_id]
    return f"[{names[int.from_bytes(raw[4:8], 'little')]}]"


def iter_strings(raw: bytes) -> Iterator[bytes]:
    """Yield the items of an array of strings, one at a time: a vocabulary as a list takes 20 MB."""
    (count,) = struct.unpack_from("<Q", raw, 8)
    unpack, at = struct.Struct("<Q").unpack_from, 16
    for _ in range(count):
        (length,) = unpack(raw, at)
        yield raw[at + 8 : at + 8 + length]
        at += 8 + length
