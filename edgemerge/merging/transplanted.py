"""A model whose tensors of tokens have another vocabulary's rows: its own, and new ones from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from edgemerge.formats.adapters.adapted import HoldingSource
from edgemerge.formats.files import fill_buffers
from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.formats.quants.codec import CODECS
from edgemerge.formats.quants.codec import row_bytes as bytes_of_row
from edgemerge.types import FileState, Source, TensorSpec, UInt8

__all__ = ["NO_ROW", "TransplantedModel", "stored_spec"]

NO_ROW = np.iinfo(np.int32).min  # of a token without a row: zeros

Int32 = NDArray[np.int32]


def stored_spec(spec: TensorSpec, n_rows: int) -> TensorSpec:
    """Describe a tensor of tokens with another number of rows: of its type, or F16 if none writes that."""
    dtype = spec.dtype if CODECS[spec.dtype].can_encode else "F16"
    nbytes = n_rows * bytes_of_row(dtype, spec.n_cols)
    return replace(spec, shape=(n_rows, spec.n_cols), dtype=dtype, nbytes=nbytes)


class TransplantedModel:
    """A `Source`: a model with other tokens.

    Parameters
    ----------
    model : Source
        The model; closed by whoever opened it.
    tokenizer : mapping of GGUF key to typed value
        The `tokenizer.` keys that it gets.
    rows : mapping of str to int32 array (n_tokens,)
        Of each tensor of tokens: the model's row, or ~i for row i of the file, or `NO_ROW`.
    starts : mapping of str to int
        Where in the file the new rows of each tensor begin.
    fd : int
        The file: new rows, encoded as `stored_spec` says.
    """

    def __init__(
        self,
        model: Source,
        tokenizer: Mapping[str, bytes],
        rows: Mapping[str, Int32],
        starts: Mapping[str, int],
        fd: int,
    ) -> None:
        self.path, self.architecture = model.path, model.architecture
        self._model, self._rows, self._starts, self._fd = model, rows, starts, fd
        specs = model.specs()
        self._specs = {
            name: stored_spec(spec, len(rows[name])) if name in rows else spec
            for name, spec in specs.items()
        }
        kept = {k: v for k, v in model.metadata().items() if not k.startswith("tokenizer.")}
        size = f"{model.architecture}.vocab_size"
        if size in kept:
            kept[size] = encode_value(len(next(iter(rows.values()))), "u32")
        self._metadata = {**kept, **tokenizer}

    def specs(self) -> Mapping[str, TensorSpec]:
        """All tensors by GGUF name."""
        return self._specs

    def metadata(self) -> Mapping[str, bytes]:
        """Return the model's keys, with the other vocabulary."""
        return self._metadata

    def read_rows(self, name: str, start: int, stop: int, out_u8: UInt8) -> None:
        """Fill `out_u8` ((stop - start) * row_bytes,) with rows [start, stop)."""
        if name not in self._rows:
            self._model.read_rows(name, start, stop, out_u8)
            return
        rows, n_bytes = self._rows[name][start:stop].astype(np.int64), self._specs[name].row_bytes
        new = rows < 0
        steps = np.where(new[1:], -1, 1)  # ~i counts down where i counts up
        breaks = np.flatnonzero((np.diff(rows) != steps) | (new[1:] != new[:-1])) + 1
        for first, last in pairwise([0, *breaks.tolist(), len(rows)]):
            self._read_run(
                name, int(rows[first]), last - first, out_u8[first * n_bytes : last * n_bytes]
            )

    def _read_run(self, name: str, row: int, n_rows: int, out_u8: UInt8) -> None:
        own, made = self._model.specs()[name], self._specs[name]
        if row == NO_ROW:
            out_u8[:] = 0  # which every type decodes to zeros
        elif row < 0:
            offset = self._starts[name] + ~row * made.row_bytes
            fill_buffers(self._fd, [out_u8.data.cast("B")], offset, self.path, name)
        elif own.dtype == made.dtype:
            self._model.read_rows(name, row, row + n_rows, out_u8)
        else:
            raw = np.empty(own.row_bytes, np.uint8)
            values = np.empty(own.n_cols, np.float32)
            scratch = np.empty(CODECS[made.dtype].scratch_len, np.float32)
            for i in range(n_rows):
                self._model.read_rows(name, row + i, row + i + 1, raw)
                CODECS[own.dtype].decode(raw, values)
                out = np.empty(made.row_bytes, np.uint8)
                CODECS[made.dtype].encode(values, out, scratch)
                out_u8[i * made.row_bytes : (i + 1) * made.row_bytes] = out

    def forget(self, name: str, n_rows: int | None = None) -> None:
        """Drop a tensor's pages from the page cache; a hint."""
        if name not in self._rows:
            self._model.forget(name, n_rows)
        elif n_rows is None:
            self._model.forget(name)

    def notes(self) -> Sequence[str]:
        """Say what the model's reader says."""
        return self._model.notes()

    def work_bytes(self) -> int:
        """Bytes that each thread takes to read rows, beside those that it reads into."""
        widest = max(8 * spec.n_cols for spec in self._specs.values())
        return self._model.work_bytes() + widest + sum(rows.nbytes for rows in self._rows.values())

    def held_parts(self) -> Mapping[int, int]:
        """Bytes that the model's adapters take for all threads."""
        return self._model.held_parts() if isinstance(self._model, HoldingSource) else {}

    def states(self) -> Sequence[FileState]:
        """Return what the model's files were when they were opened."""
        return self._model.states()

    def check_unchanged(self) -> None:
        """Raise FormatError where a file of the model was written to since."""
        self._model.check_unchanged()

    def close(self) -> None:
        """Do nothing: the model is closed by whoever opened it."""
