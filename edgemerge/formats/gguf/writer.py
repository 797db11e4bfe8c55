"""The layout of a GGUF file to be: its whole header, and where each tensor will lie.

Everything follows from names, shapes and types, so the header is complete before the first block is
merged, and blocks can be written in any order. Format: ggml/docs/gguf.md.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

from edgemerge.formats.gguf import metadata as meta
from edgemerge.formats.gguf.header import ALIGNMENT_KEY, DEFAULT_ALIGNMENT, align_up
from edgemerge.formats.gguf.split import COUNT_KEY, NUMBER_KEY, TOTAL_KEY, divide_tensors
from edgemerge.formats.layout import FileLayout
from edgemerge.formats.quants.codec import GGML_TYPES
from edgemerge.types import TensorSpec

__all__ = ["make_layout", "make_layouts"]

_TYPE_IDS = {name: type_id for type_id, name in GGML_TYPES.items()}


def make_layout(metadata: Mapping[str, bytes], specs: Iterable[TensorSpec]) -> FileLayout:
    """Lay out a GGUF version 3 file.

    Parameters
    ----------
    metadata : mapping of str to bytes
        Key -> typed value (`edgemerge.formats.gguf.metadata`); `general.alignment` is honoured.
    specs : iterable of TensorSpec
        In the order in which the file will list them; `nbytes` must be the stored size.
    """
    specs = list(specs)
    raw_alignment = meta.get_value(metadata, ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    assert isinstance(raw_alignment, int)
    infos, relative, at = [], {}, 0
    for spec in specs:
        relative[spec.name] = at
        infos.append(_tensor_info(spec, at))
        at = align_up(at + spec.nbytes, raw_alignment)
    header = b"".join(
        [
            struct.pack("<4sIQQ", b"GGUF", 3, len(specs), len(metadata)),
            *(_counted(key) + value for key, value in metadata.items()),
            *infos,
        ]
    )
    header += bytes(align_up(len(header), raw_alignment) - len(header))
    offsets = {name: len(header) + offset for name, offset in relative.items()}
    return FileLayout(header, offsets, len(header) + at)


def make_layouts(
    metadata: Mapping[str, bytes], specs: Iterable[TensorSpec], max_bytes: int | None
) -> list[FileLayout]:
    """Lay out the files of one model: one without `max_bytes`, else as many as it takes.

    Parameters
    ----------
    metadata, specs
        As for `make_layout`; the first file has all metadata, and every file says its place.
    max_bytes : int, optional
        Most bytes of tensors in one file; see `edgemerge.formats.gguf.split.divide_tensors`.
    """
    if max_bytes is None:
        return [make_layout(metadata, specs)]
    parts = divide_tensors(specs, max_bytes)
    total = sum(len(part) for part in parts)
    layouts = []
    for i, part in enumerate(parts):
        place = {
            NUMBER_KEY: meta.encode_value(i, "u16"),
            COUNT_KEY: meta.encode_value(len(parts), "u16"),
            TOTAL_KEY: meta.encode_value(total, "i32"),
        }
        layouts.append(make_layout({**metadata, **place} if i == 0 else place, part))
    return layouts


def _tensor_info(spec: TensorSpec, offset: int) -> bytes:
    dims = struct.pack(f"<I{len(spec.shape)}Q", len(spec.shape), *reversed(spec.shape))
    return _counted(spec.name) + dims + struct.pack("<IQ", _TYPE_IDS[spec.dtype], offset)


def _counted(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw
