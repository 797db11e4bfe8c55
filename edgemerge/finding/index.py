"""model.safetensors.index.json: which of a directory's files holds which tensor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from edgemerge.errors import FormatError
from edgemerge.finding.json_objects import parse_object

__all__ = ["INDEX", "MAX_INDEX_BYTES", "MAX_NAME", "parse_index"]

INDEX = "model.safetensors.index.json"
# DeepSeek-V3's index has 9 MB and 91 000 tensors.
MAX_INDEX_BYTES, MAX_INDEX_VALUES = 24_000_000, 250_000
MAX_NAME = 255  # bytes, as file systems have it


def parse_index(raw: bytes, path: Path) -> dict[str, str]:
    """Return the name of the file that holds each tensor.

    Parameters
    ----------
    raw : bytes
        What was read, at most `MAX_INDEX_BYTES`.
    path : Path
        Named in errors.

    Raises
    ------
    FormatError
        It is no index, or a name is none of a file in the same directory.
    """
    weight_map: Any = parse_object(raw, path, max_values=MAX_INDEX_VALUES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError("has no weight_map; get the file again", path=path)
    for tensor, shard in weight_map.items():
        if not _is_plain(shard):
            raise FormatError(
                f"its shard {str(shard)[:80]!r} is not a plain *.safetensors file name in the same "
                "directory; get the file again",
                path=path,
                tensor=tensor[:80],
            )
    return weight_map


def _is_plain(name: object) -> bool:
    """Tell whether a text is a file's name alone. Half of a surrogate pair is not printable either."""
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and name == os.path.basename(name)
        and name.isprintable()
        and len(name.encode()) <= MAX_NAME
    )
