"""GGUF's typed key-value pairs, as bytes.

A value is kept exactly as GGUF stores it: a little-endian u32 type, then the payload. So what we do not
need to understand (a vocabulary of 262 000 tokens, a chat template) passes from input to output
unchanged, without a Python object per token. Format: ggml/docs/gguf.md, `gguf_metadata_value_t`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

__all__ = [
    "SCALARS",
    "TYPE_IDS",
    "Value",
    "decode_value",
    "encode_value",
    "get_value",
    "iter_strings",
]
__all__ += ["value_kind"]

Scalar: TypeAlias = int | float | bool | str
Value: TypeAlias = Scalar | list[Scalar]

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
TYPE_IDS: dict[str, int] = {name: type_id for name, (type_id, _) in SCALARS.items()} | {
    "str": STRING
}
_FORMATS = {type_id: fmt for type_id, fmt in SCALARS.values()}


def encode_value(value: Value | bytes | Sequence[Scalar | bytes], kind: str) -> bytes:
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
        head = struct.pack("<IIQ", ARRAY, TYPE_IDS[element], len(value))
        if element == "str":
            return head + b"".join(_payload(item, "str") for item in value)
        return head + struct.pack(f"<{len(value)}{SCALARS[element][1][1]}", *value)
    assert isinstance(value, str | bytes | int | float)
    return struct.pack("<I", TYPE_IDS[kind]) + _payload(value, kind)


def _payload(value: Scalar | bytes, kind: str) -> bytes:
    if kind == "str":
        raw = value.encode("utf-8") if isinstance(value, str) else value
        assert isinstance(raw, bytes)
        return struct.pack("<Q", len(raw)) + raw
    return struct.pack(SCALARS[kind][1], value)


def decode_value(raw: bytes) -> Value:
    """Decode one typed value that `encode_value` or a checked GGUF header gave; bad UTF-8 is replaced."""
    value, end = _decode(raw, 4, struct.unpack_from("<I", raw)[0])
    assert end == len(raw)
    return value


def _decode(raw: bytes, at: int, type_id: int) -> tuple[Value, int]:
    if type_id == STRING:
        (length,) = struct.unpack_from("<Q", raw, at)
        return raw[at + 8 : at + 8 + length].decode("utf-8", "replace"), at + 8 + length
    if type_id == ARRAY:
        element, count = struct.unpack_from("<IQ", raw, at)
        at += 12
        if element in _FORMATS:
            fmt = f"<{count}{_FORMATS[element][1]}"
            return list(struct.unpack_from(fmt, raw, at)), at + struct.calcsize(fmt)
        items: list[Scalar] = []
        for _ in range(count):
            item, at = _decode(raw, at, element)
            items.append(item)  # type: ignore[arg-type]  # nested arrays stay nested lists
        return items, at
    fmt = _FORMATS[type_id]
    return struct.unpack_from(fmt, raw, at)[0], at + struct.calcsize(fmt)


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
