"""Messages between a server and a model's process: a length and JSON, over a pair of sockets.

A record is an object whose only key is `!` and the record's name. A chat, whose keys are a client's, travels
as a text within the text, so that none of it is taken for a record.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from edgemerge import errors
from edgemerge.runtime.engine import messages
from edgemerge.runtime.engine.options import EngineFacts, EngineOptions
from edgemerge.runtime.llama import Lora

__all__ = ["Unpacker", "pack"]

_LENGTH = struct.Struct("<I")
_RECORDS: dict[str, Any] = {kind.__name__: kind for kind in (EngineFacts, EngineOptions, Lora)}
_RECORDS |= {name: getattr(messages, name) for name in messages.__all__ if name != "Chat"}
_ERRORS = {name: getattr(errors, name) for name in errors.__all__}


def pack(message: Any) -> bytes:
    """Bytes of a message."""
    body = json.dumps(message, default=_write).encode()
    return _LENGTH.pack(len(body)) + body


def _write(value: Any) -> dict[str, Any]:
    if isinstance(value, messages.Chat):
        return {"!Chat": json.dumps([value.messages, value.names])}
    if is_dataclass(value):
        return {f"!{type(value).__name__}": [getattr(value, one.name) for one in fields(value)]}
    if isinstance(value, bytes):
        return {"!bytes": value.decode("latin-1")}
    if isinstance(value, Path):
        return {"!Path": str(value)}
    if isinstance(value, errors.EdgemergeError):
        return {"!error": [type(value).__name__, value.args, list(vars(value).items())]}
    raise TypeError(f"no message is made of {type(value).__name__}")


def _read(found: dict[str, Any]) -> Any:
    """Make the value of an object of one key; those of several are plain."""
    name: str = next(iter(found), "")
    if len(found) != 1 or not name.startswith("!"):
        return found
    value: Any = found[name]
    name = name[1:]
    if name == "Chat":
        return messages.Chat(*json.loads(value))
    if name == "bytes":
        return value.encode("latin-1")
    if name == "Path":
        return Path(value)
    if name == "error":
        kind, arguments, attributes = value
        error = _ERRORS[kind].__new__(_ERRORS[kind], *arguments)
        error.__dict__.update(attributes)
        return error
    record = _RECORDS[name]
    parts = zip(fields(record), value, strict=True)
    return record(*(_freeze(item) if one.type.startswith("tuple") else item for one, item in parts))


def _freeze(value: Any) -> Any:
    """JSON has no tuples."""
    return tuple(map(_freeze, value)) if isinstance(value, list) else value


class Unpacker:
    """Messages from the bytes that come."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def push(self, data: bytes) -> Iterator[Any]:
        """Add bytes; give the messages that are complete. Their tuples have become lists."""
        self._bytes += data
        while len(self._bytes) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._bytes)[0]
            if len(self._bytes) < end:
                return
            body = bytes(self._bytes[_LENGTH.size : end])
            del self._bytes[:end]
            yield json.loads(body, object_hook=_read)
