"""The header of a safetensors file, parsed strictly; data is read elsewhere.

A file is a u64 length, that many bytes of JSON (name -> dtype, shape, begin and end of its data),
then the data without gaps. Checks run in the order of `SafeTensors::read_metadata` of
safetensors/src/tensor.rs and go further where that accepts what the specification forbids:
duplicate keys, aliased tensors, leading space.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from edgemerge.errors import FormatError
from edgemerge.finding.json_objects import parse_object
from edgemerge.formats.byte_file import open_file
from edgemerge.formats.files import describe_foreign

__all__ = [
    "DTYPE_BITS",
    "MAX_HEADER_VALUES",
    "METADATA_KEY",
    "StoredTensor",
    "read_header",
    "read_metadata",
]

# `Dtype` of safetensors/src/tensor.rs; what edgemerge can merge of these, `hub` decides.
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
METADATA_KEY = "__metadata__"
# The format's own bound is 100 MB, which as Python's objects is more memory than a small board has.
# Eight values or so per tensor, so 30 000 tensors: more than the largest models have in one file.
MAX_HEADER_BYTES = 12_000_000
MAX_HEADER_VALUES = 250_000
MAX_NAME_BYTES = 512
MAX_DIMS = 64
MAX_SIZE = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where and how one tensor lies in its file."""

    dtype: str  # a key of `DTYPE_BITS`
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    nbytes: int


def read_header(path: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """Read and check the header of a safetensors file.

    Parameters
    ----------
    path : path-like
        The file.

    Returns
    -------
    dict of str to StoredTensor
        By Hugging Face name, in the order of the header.

    Raises
    ------
    FormatError
        The file is no safetensors file, or its header breaks the format.
    """
    path = Path(path)
    raw, file_size = _read_header_bytes(path)
    table = parse_object(raw, path, max_values=MAX_HEADER_VALUES, unique_keys=True)
    _check_metadata(table.pop(METADATA_KEY, {}), path)
    data_start = 8 + len(raw)
    tensors = {name: _parse_entry(name, entry, data_start, path) for name, entry in table.items()}
    _check_layout(tensors, data_start, file_size, path)
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """Read what the header of a safetensors file says besides its tensors.

    Raises
    ------
    FormatError
        As of `read_header`.
    """
    raw, _ = _read_header_bytes(path)
    table = parse_object(raw, path, max_values=MAX_HEADER_VALUES, unique_keys=True)
    found: dict[str, str] = table.get(METADATA_KEY, {})
    _check_metadata(found, path)
    return found


def _read_header_bytes(path: Path) -> tuple[bytes, int]:
    try:
        file = open_file(path)
    except OSError as e:
        raise FormatError(f"cannot be opened ({e.strerror}); get the file again", path=path) from e
    try:
        size = file.state.n_bytes
        if not file.is_regular:
            raise FormatError("is not a regular file; give a model directory", path=path)
        head = file.read(16, 0)
        length = int.from_bytes(head[:8], "little")
        if len(head) < 9 or head[8:9] != b"{":
            raise FormatError(describe_foreign(file.read(64, 0), "safetensors"), path=path)
        if length > MAX_HEADER_BYTES:
            raise FormatError(
                f"claims a header of {length} bytes, the most is {MAX_HEADER_BYTES}; "
                "get the file again",
                path=path,
            )
        if 8 + length > size:
            raise FormatError(
                f"claims a header of {length} bytes but has {size} in all; it is cut "
                "short, get the file again",
                path=path,
            )
        raw = file.read(length, 8)
        if len(raw) != length:
            raise FormatError("ended while its header was read; get the file again", path=path)
        return raw, size
    finally:
        file.close()


def _check_metadata(value: Any, path: Path) -> None:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise FormatError(
            f"its {METADATA_KEY} does not map strings to strings; write the file again", path=path
        )


def _parse_entry(name: str, entry: Any, data_start: int, path: Path) -> StoredTensor:
    """Check one tensor by itself: name, dtype, shape, and a byte range of the size these demand."""

    def refuse(what: str) -> FormatError:
        shown = name if len(name) <= 80 else name[:80] + "…"
        return FormatError(f"{what}; get the file again", path=path, tensor=shown)

    if not name or "\0" in name:
        raise refuse("its name is empty or holds a NUL")
    if len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
        raise refuse(f"its name has more than {MAX_NAME_BYTES} bytes")
    if not isinstance(entry, dict):
        raise refuse("its header entry is not an object")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise refuse(f"its dtype {str(dtype)[:40]!r} is none that safetensors knows")
    shape = _sizes(entry.get("shape"))
    if shape is None or len(shape) > MAX_DIMS:
        raise refuse(f"its shape is not a list of at most {MAX_DIMS} integers from 0 to 2^63 - 1")
    offsets = _sizes(entry.get("data_offsets"))
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse("its data_offsets are not two integers 0 <= begin <= end")
    # Python's integers do not overflow but those of C do; a zero must not hide a huge partner.
    n_bits = prod(size for size in shape if size) * DTYPE_BITS[dtype]
    if n_bits > MAX_SIZE:
        raise refuse(f"its shape {list(shape)} is larger than any file")
    if 0 in shape:
        n_bits = 0
    n_bytes = offsets[1] - offsets[0]
    if n_bits != 8 * n_bytes:
        raise refuse(
            f"its shape {list(shape)} of {dtype} needs {n_bits} bits, it has {8 * n_bytes}"
        )
    return StoredTensor(dtype, shape, data_start + offsets[0], n_bytes)


def _sizes(value: Any) -> tuple[int, ...] | None:
    """Non-negative 63-bit integers as a tuple, or None; `True` and `4.0` are no integers here."""
    if not isinstance(value, list):
        return None
    if not all(type(item) is int and 0 <= item <= MAX_SIZE for item in value):
        return None
    return tuple(value)


def _check_layout(
    tensors: dict[str, StoredTensor], data_start: int, file_size: int, path: Path
) -> None:
    """Every byte of the data belongs to exactly one tensor, and the last one ends the file."""
    end = data_start
    for name, tensor in sorted(tensors.items(), key=lambda t: (t[1].offset, t[1].nbytes)):
        if tensor.offset != end:
            what = "overlaps the tensor before it" if tensor.offset < end else "leaves a hole"
            raise FormatError(
                f"{what}: it begins at byte {tensor.offset}, not {end}; get the file again",
                path=path,
                tensor=name,
            )
        end += tensor.nbytes
    if end != file_size:
        problem = "is cut short" if file_size < end else "has bytes after its last tensor"
        raise FormatError(
            f"{problem}: {file_size} bytes, its header describes {end}; get the file again",
            path=path,
        )
