"""The few data types that the modules exchange; no logic beyond derived sizes.

Vocabulary: every model, whatever its file format, is seen through GGUF's eyes. Tensor names are GGUF
names (`blk.0.attn_q.weight`), shapes are row-major (NumPy order, the reverse of GGUF's dimensions on
disk), q and k rows are in GGUF's rotary order, and a type is ggml's name for it (`F16`, `Q4_K`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Float32", "Source", "TensorSpec", "UInt8"]

Float32 = NDArray[np.float32]
UInt8 = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, shape and storage of one tensor.

    A row is one contiguous run of `shape[-1]` elements (in_features of a matrix); a vector is one row.
    """

    name: str
    shape: tuple[int, ...]  # row-major
    dtype: str  # ggml type name
    nbytes: int

    @property
    def n_elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def n_cols(self) -> int:
        """Elements in one row."""
        return self.shape[-1] if self.shape else 1

    @property
    def n_rows(self) -> int:
        """Number of rows: the product of all dimensions but the last."""
        return prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Stored bytes of one row."""
        return self.nbytes // self.n_rows if self.n_rows else 0


class Source(Protocol):
    """A model on disk that can be read by rows. Reading is thread-safe (`pread`)."""

    path: Path
    architecture: str  # GGUF's general.architecture, e.g. "llama"

    def specs(self) -> Mapping[str, TensorSpec]:
        """All tensors by GGUF name, in the order in which GGUF lists them."""

    def metadata(self) -> Mapping[str, bytes]:
        """GGUF key -> typed value as GGUF encodes it (see `edgemerge.formats.metadata`)."""

    def read_rows(self, name: str, start: int, stop: int, out_u8: UInt8) -> None:
        """Fill `out_u8` ((stop - start) * row_bytes,) with rows [start, stop) of a tensor, as stored."""

    def forget(self, name: str) -> None:
        """Tell the operating system that a tensor's pages will not be read again."""

    def close(self) -> None:
        """Close the files."""
