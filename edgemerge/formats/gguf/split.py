"""Models in several GGUF files: what the files are called, and which tensors go where.

Names and keys are those of llama.cpp's tools/gguf-split/gguf-split.cpp and `llama_split_path`:
NAME-00001-of-00003.gguf; the first file has the whole metadata.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from edgemerge.errors import FormatError
from edgemerge.finding.cache import folder_name
from edgemerge.types import TensorSpec

__all__ = ["COUNT_KEY", "MAX_PARTS", "NUMBER_KEY", "TOTAL_KEY", "divide_tensors", "find_parts"]
__all__ += ["part_paths", "sibling_parts", "whole_name"]

NUMBER_KEY = "split.no"  # u16, from 0
COUNT_KEY = "split.count"  # u16
TOTAL_KEY = "split.tensors.count"  # i32, of all parts
MAX_PARTS = (1 << 16) - 1

_PART = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")


def part_paths(whole: Path, count: int) -> list[Path]:
    """Name the files of a split of `whole` (OUT.gguf), in order."""
    stem = whole.name.removesuffix(".gguf")
    return [whole.with_name(f"{stem}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]


def whole_name(path: Path) -> str:
    """Return a model's file name without what makes it a part's; of the hub's cache, the repository's."""
    match = _PART.fullmatch(path.name)
    return f"{match['stem']}.gguf" if match else folder_name(path)


def sibling_parts(path: Path) -> list[Path]:
    """List the files of the split that a file is a part of, going by its name; else the file."""
    match = _PART.fullmatch(path.name)
    return part_paths(path.with_name(whole_name(path)), int(match["count"])) if match else [path]


def find_parts(path: Path, number: int, count: int) -> list[Path]:
    """Find all files of a split.

    Parameters
    ----------
    path : Path
        One of them.
    number, count : int
        What that file states: its place, from 0, and how many there are.

    Raises
    ------
    FormatError
        Some are missing or named otherwise, or the place is impossible.
    """
    if not 0 <= number < count <= MAX_PARTS:
        raise FormatError(
            f"states that it is part {number + 1} of {count}, which cannot be; get it again",
            path=path,
        )
    paths = part_paths(path.with_name(whole_name(path)), count)
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        listed = ", ".join(missing[:4]) + (" and more" if len(missing) > 4 else "")
        raise FormatError(
            f"is part {number + 1} of a split of {count}, and beside it there is no {listed}; "
            "get the missing parts, under these names",
            path=path,
        )
    if not path.samefile(paths[number]):
        raise FormatError(
            f"states that it is part {number + 1} of {count}, which its name does not; "
            "get all parts of one split",
            path=path,
        )
    return paths


def divide_tensors(specs: Iterable[TensorSpec], max_bytes: int) -> list[Sequence[TensorSpec]]:
    """Divide a model's tensors among files, in their order.

    As gguf-split counts: tensors alone, each padded to 32 bytes. Where gguf-split gives up, because
    the first tensor is larger than a file may be, that tensor stands alone like any other.

    Parameters
    ----------
    specs : iterable of TensorSpec
        At least one.
    max_bytes : int
        Most bytes of tensors in one file; only a single tensor may be larger.
    """
    parts: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        padded = -(-spec.nbytes // 32) * 32
        if parts[-1] and size + padded > max_bytes:
            parts.append([])
            size = 0
        parts[-1].append(spec)
        size += padded
    return list(parts)
