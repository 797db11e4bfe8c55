"""The layout of a GGUF file to be: its whole header, and where each tensor will lie.

Everything follows from names, shapes and types, so the header is complete before the first block is
merged, and blocks can be written in any order. Format: ggml/docs/gguf.md.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from edgemerge.formats import metadata as meta
from edgemerge.formats.codec import GGML_TYPES
from edgemerge.formats.gguf import ALIGNMENT_KEY, DEFAULT_ALIGNMENT, align_up
from edgemerge.types import TensorSpec

__all__ = ["GgufLayout", "make_layout"]

_TYPE_IDS = {name: type_id for type_id, name in GGML_TYPES.items()}


@dataclass(frozen=True, slots=True)
class GgufLayout:
    """Header bytes and absolute tensor offsets of one GGUF file."""

    header: bytes  # padded, so that tensor data begins at len(header)
    offsets: dict[str, int]  # tensor name -> absolute position
    n_bytes: int  # of the finished file


def make_layout(metadata: Mapping[str, bytes], specs: Iterable[TensorSpec]) -> GgufLayout:
    """Lay out a GGUF version 3 file.

    Parameters
    ----------
    metadata : mapping of str to bytes
        Key -> typed value (`formats.metadata`); `general.alignment` is honoured.
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
    return GgufLayout(header, offsets, len(header) + at)


def _tensor_info(spec: TensorSpec, offset: int) -> bytes:
    dims = struct.pack(f"<I{len(spec.shape)}Q", len(spec.shape), *reversed(spec.shape))
    return _counted(spec.name) + dims + struct.pack("<IQ", _TYPE_IDS[spec.dtype], offset)


def _counted(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw
