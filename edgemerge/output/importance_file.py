"""Writing importance matrices, in both forms that llama-imatrix writes.

The bytes are those of `save_imatrix` and `save_imatrix_legacy` of llama.cpp's tools/imatrix/imatrix.cpp. What
reads them is `edgemerge.formats.quants.imatrix`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.formats.gguf.writer import make_layout
from edgemerge.formats.layout import FileLayout
from edgemerge.formats.quants.imatrix import CHUNK_SIZE_KEY, CHUNKS_KEY, COUNTS, DATASETS_KEY, SUMS
from edgemerge.output.file import OutputFile
from edgemerge.types import Float32, TensorSpec

__all__ = ["OLD_SUFFIX", "Squares", "write_importances"]

OLD_SUFFIX = ".dat"


@dataclass(slots=True)
class Squares:
    """What was seen of one tensor's inputs.

    Attributes
    ----------
    sums : (n_matrices, n_cols) float32
        Sums of squares; a row for each matrix of a stack.
    counts : (n,) int64
        Rows that were added up: of each expert, or one for all matrices.
    """

    sums: Float32
    counts: NDArray[np.int64]


def write_importances(
    path: Path,
    squares: Mapping[str, Squares],
    *,
    dataset: Path,
    n_ctx: int,
    check: Callable[[], None] | None = None,
) -> int:
    """Write an importance matrix whole, and replace a file of that name.

    Parameters
    ----------
    path : Path
        The older form where it ends in `.dat`, else GGUF.
    squares : mapping of str to Squares
        By GGUF tensor name; at least one.
    dataset : Path
        What the file says that they were recorded on.
    n_ctx : int
        Tokens of a chunk.
    check : callable, optional
        Raises OutputError where a file of that name must not be replaced; called just before that.

    Returns
    -------
    int
        Bytes of the file.

    Raises
    ------
    OutputError
        The disk refused.
    """
    squares = dict(sorted(squares.items(), key=lambda item: item[0].encode()))
    n_chunks = max(int(entry.counts.max()) for entry in squares.values()) // n_ctx
    tensors: dict[str, Float32] = {}
    if path.suffix == OLD_SUFFIX:
        raw = _encode_old(squares, dataset, n_chunks, n_ctx)
        layout = FileLayout(raw, {}, len(raw))
    else:
        tensors = _list_tensors(squares)
        metadata = {
            "general.type": encode_value("imatrix", "str"),
            DATASETS_KEY: encode_value([os.fsencode(dataset)], "[str]"),
            CHUNKS_KEY: encode_value(n_chunks, "u32"),
            CHUNK_SIZE_KEY: encode_value(n_ctx, "u32"),
        }
        specs = [TensorSpec(name, x.shape, "F32", x.nbytes) for name, x in tensors.items()]
        layout = make_layout(metadata, specs)
    with OutputFile(path, layout.n_bytes) as file:
        file.write(layout.header, 0)
        for name, x in tensors.items():
            file.write(np.ascontiguousarray(x).view(np.uint8), layout.offsets[name])
        if check is not None:
            check()
        file.publish()
    return layout.n_bytes


def _list_tensors(squares: Mapping[str, Squares]) -> dict[str, Float32]:
    """List the tensors of the GGUF form by name."""
    tensors: dict[str, Float32] = {}
    for name, entry in squares.items():
        n = len(entry.counts)
        counts = entry.counts.astype(np.float32)
        # One row is a vector to ggml, which leaves out outer axes of length 1.
        tensors[name + SUMS] = entry.sums.reshape((n, -1) if n > 1 else -1)
        tensors[name + COUNTS] = counts.reshape((n, 1) if n > 1 else 1)
    return tensors


def _encode_old(squares: Mapping[str, Squares], dataset: Path, n_chunks: int, n_ctx: int) -> bytes:
    """Encode the older form: means times chunks, so that what was never seen counts as 1."""
    seen = {name: entry for name, entry in squares.items() if entry.counts.any()}
    parts = [struct.pack("<i", len(seen))]
    for name, entry in seen.items():
        n_calls = -(-int(entry.counts.max()) // n_ctx)
        counts = np.repeat(entry.counts, entry.sums.size // entry.counts.size).astype(np.float32)
        sums = np.where(counts == 0, np.float32(1), entry.sums.ravel())
        means = sums / np.where(counts == 0, np.float32(1), counts) * np.float32(n_calls)
        parts += [_counted(name.encode()), struct.pack("<ii", n_calls, means.size), means.tobytes()]
    return b"".join([*parts, struct.pack("<i", n_chunks), _counted(os.fsencode(dataset))])


def _counted(raw: bytes) -> bytes:
    return struct.pack("<i", len(raw)) + raw
