"""Messages between a server and a model's process: a length and a pickle, over a pair of sockets.

Both ends are this program. What a client or a model's file brings is in the values only: texts and numbers
of the classes in `messages` and `options`.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterator
from typing import Any

__all__ = ["Unpacker", "pack"]

_LENGTH = struct.Struct("<I")


def pack(message: Any) -> bytes:
    """Bytes of a message."""
    body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(body)) + body


class Unpacker:
    """Messages from the bytes that come."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def push(self, data: bytes) -> Iterator[Any]:
        """Add bytes; give the messages that are complete."""
        self._bytes += data
        while len(self._bytes) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._bytes)[0]
            if len(self._bytes) < end:
                return
            body = bytes(self._bytes[_LENGTH.size : end])
            del self._bytes[:end]
            yield pickle.loads(body)
