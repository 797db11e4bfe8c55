"""How a model with adapters or deltas is written: `BASE+ADAPTER`, or `BASE+0.5*ADAPTER+0.3*ADAPTER`.

As a path such a text names nothing that exists. So everything that takes the path of a model takes it.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from edgemerge.formats.byte_file import open_file
from edgemerge.formats.gguf.split import whole_name
from edgemerge.formats.hub.files import is_adapter_dir

__all__ = ["AdapterUse", "ModelReference", "expand_inputs", "join_reference", "model_name"]
__all__ += ["is_adapter", "split_reference", "split_weight"]

HEAD = 4096  # bytes of a GGUF file, where converters write general.type
MAX_PLUS = 64  # signs in one text that are tried as the end of a name

# The key and its value as GGUF stores them: a text.
_TYPES = [b"general.type" + struct.pack("<IQ", 8, len(t)) + t for t in (b"adapter", b"delta")]
_WEIGHT = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\*(.+)", re.ASCII | re.IGNORECASE)


class AdapterUse(NamedTuple):
    """An adapter, and by how much its change is multiplied."""

    path: Path
    weight: float = 1.0


class ModelReference(NamedTuple):
    """A model and the adapters that are added to it."""

    base: Path
    adapters: tuple[AdapterUse, ...]


def split_weight(text: str) -> tuple[str, float]:
    """Split `0.5*ADAPTER`; without a number the weight is 1."""
    match = _WEIGHT.fullmatch(text)
    if match is None or not math.isfinite(weight := float(match[1])):
        return text, 1.0
    return match[2], weight


def join_reference(base: Path, adapters: Iterable[AdapterUse]) -> Path:
    """Write a reference as a path; `split_reference` reads it."""
    parts = [str(base)]
    parts += [str(a.path) if a.weight == 1.0 else f"{a.weight!r}*{a.path}" for a in adapters]
    return Path("+".join(parts))


def split_reference(path: str | os.PathLike[str]) -> ModelReference | None:
    """Read a reference. None where the path exists, or where it is none of files that do.

    Names may hold a plus: what exists decides which of them ends a name.
    """
    text = os.fspath(path)
    if "+" not in text or os.path.lexists(text):
        return None
    pieces = text.split("+", MAX_PLUS)
    for i in range(1, len(pieces)):
        base = "+".join(pieces[:i])
        if os.path.exists(base) and (adapters := _read_adapters(pieces[i:])):
            return ModelReference(Path(base), adapters)
    return None


def _read_adapters(pieces: list[str]) -> tuple[AdapterUse, ...] | None:
    """Read what stands after the base; None where no division of it names what exists."""
    for stop in range(len(pieces), 0, -1):
        name, weight = split_weight("+".join(pieces[:stop]))
        if not name or not os.path.exists(name):
            continue
        rest = _read_adapters(pieces[stop:]) if stop < len(pieces) else ()
        if rest is not None:
            return AdapterUse(Path(name), weight), *rest
    return None


def is_adapter(path: Path) -> bool:
    """Tell whether a path is a LoRA adapter or a delta: a directory of PEFT without a model, or a GGUF."""
    if path.is_dir():
        return is_adapter_dir(path)
    try:
        with closing(open_file(path)) as file:
            head = file.read(HEAD, 0) if file.is_regular else b""
            return any(stated in head for stated in _TYPES)
    except OSError:
        return False


def model_name(path: Path) -> str:
    """Return a model's file name without what makes it a part's; with its adapters, where it has some."""
    reference = split_reference(path)
    if reference is None:
        return whole_name(path)
    adapters = [use._replace(path=Path(use.path.name)) for use in reference.adapters]
    return str(join_reference(Path(whole_name(reference.base)), adapters))


def expand_inputs(paths: Iterable[Path]) -> tuple[Path, ...]:
    """List the files and folders of models: of a model with adapters, the model and each adapter."""
    found: list[Path] = []
    for path in paths:
        reference = split_reference(path)
        if reference is None:
            found.append(path)
        else:
            found += [reference.base, *(use.path for use in reference.adapters)]
    return tuple(dict.fromkeys(found))
