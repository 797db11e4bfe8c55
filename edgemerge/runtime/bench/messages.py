"""What `bench` and its child say to each other: lines of JSON, and records that are made of them again."""

from __future__ import annotations

import json
from dataclasses import asdict, is_dataclass
from types import UnionType
from typing import IO, Any, TypeVar, get_args, get_origin, get_type_hints

__all__ = ["read_message", "rebuild", "write_message"]

T = TypeVar("T")


def write_message(stream: IO[bytes], *message: Any) -> None:
    """Write a message of plain values and dataclasses of them."""
    stream.write(json.dumps(message, default=asdict).encode() + b"\n")
    stream.flush()


def read_message(stream: IO[bytes]) -> list[Any] | None:
    """Read a message; None where the other end is gone, or stopped in the middle of one."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        return None
    message = json.loads(line)
    assert isinstance(message, list)
    return message


def rebuild(kind: type[T], value: Any) -> T:
    """Make of JSON what `write_message` was given.

    Parameters
    ----------
    kind : type
        A dataclass, or the type of one of its fields: int, float, str, a tuple of one type, or what may be
        None.
    value : object
        What `json` made of it.

    Raises
    ------
    TypeError
        The value is not of that kind.
    """
    made: Any = value
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        made = kind(**{name: rebuild(hints[name], item) for name, item in value.items()})
    elif get_origin(kind) is tuple:
        made = tuple(rebuild(get_args(kind)[0], item) for item in value)
    elif get_origin(kind) is UnionType:
        made = None if value is None else rebuild(get_args(kind)[0], value)
    elif kind is float and type(value) is int:
        made = float(value)
    elif type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return made  # type: ignore[no-any-return]
