"""Reading importance matrices, as llama-imatrix writes them: how much each column of a tensor matters.

Two forms (llama.cpp's common/imatrix-loader.cpp and `load_imatrix` of tools/quantize/quantize.cpp):

- GGUF: tensors NAME.in_sum2, sums of squared activations, a row for each expert; and NAME.counts;
- the older one, often called .dat: i32 entries; for each i32 length of the name, name, i32 calls, i32
  values, float32 sums; then perhaps i32 chunks, i32 length of the data set's name, that name.

Importances are sums divided by counts. They are read when a tensor needs them; every count and length is
checked against the file before it is used, and every value once, when the file is opened.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgemerge.errors import FormatError
from edgemerge.formats.byte_file import open_file
from edgemerge.formats.files import describe_foreign
from edgemerge.formats.gguf.header import MAX_NAME_BYTES, MAX_TENSORS, HeaderParser
from edgemerge.formats.gguf.metadata import Array, get_value
from edgemerge.types import Float32, Float64, TensorSpec

__all__ = ["CHUNKS_KEY", "CHUNK_SIZE_KEY", "COUNTS", "DATASETS_KEY", "SUMS", "ImportanceMatrix"]

DATASETS_KEY = "imatrix.datasets"
CHUNKS_KEY = "imatrix.chunk_count"
CHUNK_SIZE_KEY = "imatrix.chunk_size"
NEEDED_KEYS = (DATASETS_KEY, CHUNKS_KEY, CHUNK_SIZE_KEY)
SUMS, COUNTS = ".in_sum2", ".counts"
MAX_DATASET_BYTES = 1 << 10
MAX_COUNTS = (
    1 << 20
)  # in all: kept in memory, as sums are not; 256 experts in 61 layers have 47 000
MIN_ENTRY_BYTES = 4 + 1 + 4 + 4 + 4  # length, one byte of name, calls, number of values, one value
CHUNK = 1 << 20
LARGEST = 1e20  # mean squares are far below; above it, an encoder's weighted sums could overflow


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where one tensor's sums lie, and what they are divided by."""

    offset: int
    n_values: int
    counts: Float64  # of equal runs of values; 0: nothing was seen, all columns matter alike


class ImportanceMatrix:
    """Importances of the columns of a model's tensors; reading is thread-safe (`pread`).

    Attributes
    ----------
    path : Path
        The file.
    sizes : dict
        GGUF tensor name -> number of values: columns, times experts.
    dataset : str
        What the activations were recorded on; empty where the file does not say.
    n_chunks : int
        Chunks of text; 0 where the file does not say.
    crc32 : int
        Of the whole file.
    state : FileState
        Of the file when it was opened.

    Raises
    ------
    FormatError
        The file cannot be read, breaks its format, or holds what can be no importance.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.dataset = ""
        self.n_chunks = 0
        try:
            self._file = open_file(self.path)
        except OSError as error:
            raise self._fail(f"cannot be read ({error.strerror}); check the path") from None
        try:
            if not self._file.is_regular:
                raise self._fail("is not a regular file; give what llama-imatrix wrote")
            self.state = self._file.state
            is_gguf = self._file.read(4, 0) == b"GGUF"
            self._entries = dict(self._parse_gguf() if is_gguf else self._parse_old())
            for name in self._entries:
                self._check_values(name)
            self.crc32 = self._checksum()
        except OSError as error:
            self._file.close()
            raise self._fail(f"cannot be read ({error.strerror}); check the path") from None
        except BaseException:
            self._file.close()
            raise
        self.sizes = {name: entry.n_values for name, entry in self._entries.items()}

    def read(self, name: str, start: int, out_f32: Float32) -> None:
        """Fill `out_f32` with the importances of a tensor from value `start` on."""
        entry = self._entries[name]
        self._file.fill([out_f32.data.cast("B")], entry.offset + 4 * start, name)
        run = entry.n_values // len(entry.counts)
        counts = entry.counts[(start + np.arange(out_f32.size)) // run].astype(np.float32)
        np.divide(out_f32, counts, out=out_f32, where=counts > 0)
        out_f32[counts == 0] = 1.0

    def check_unchanged(self) -> None:
        """Raise FormatError where the file was written to since it was opened."""
        self._file.check_unchanged()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _fail(self, message: str, tensor: str | None = None) -> FormatError:
        return FormatError(message, path=self.path, tensor=tensor)

    # -- GGUF ----------------------------------------------------------------------------------------

    def _parse_gguf(self) -> Iterator[tuple[str, _Entry]]:
        metadata, specs, offsets = HeaderParser(self._file).parse()
        if missing := [key for key in NEEDED_KEYS if key not in metadata]:
            raise self._fail(
                f"has no {missing[0]}, so it is no importance matrix; give what llama-imatrix wrote"
            )
        datasets = get_value(metadata, DATASETS_KEY)
        if isinstance(datasets, Array) and datasets:
            self.dataset = str(datasets[0])
        chunks = get_value(metadata, CHUNKS_KEY)
        self.n_chunks = chunks if isinstance(chunks, int) else 0
        names = {name.removesuffix(SUMS) for name in specs if name.endswith(SUMS)}
        names |= {name.removesuffix(COUNTS) for name in specs if name.endswith(COUNTS)}
        if not names:
            raise self._fail("holds no importances; make it again with llama-imatrix")
        n_counts = sum(spec.n_elements for name, spec in specs.items() if name.endswith(COUNTS))
        if n_counts > MAX_COUNTS:
            raise self._fail(
                f"has {n_counts} counts, the most are {MAX_COUNTS}; get the file again"
            )
        for name in sorted(names):
            sums, counts = specs.get(name + SUMS), specs.get(name + COUNTS)
            if sums is None or counts is None:
                raise self._fail("has sums without counts or counts without sums", name)
            yield name, self._pair(name, sums, counts, offsets)

    def _pair(
        self, name: str, sums: TensorSpec, counts: TensorSpec, offsets: dict[str, int]
    ) -> _Entry:
        if (sums.dtype, counts.dtype) != ("F32", "F32"):
            raise self._fail("has sums or counts that are not F32; make the file again", name)
        if not counts.n_elements or not sums.n_elements or sums.n_elements % counts.n_elements:
            raise self._fail(
                f"has {sums.n_elements} sums for {counts.n_elements} counts; make the file again",
                name,
            )
        values = np.empty(counts.n_elements, np.float32)
        self._file.fill([values.data.cast("B")], offsets[counts.name], counts.name)
        if not (np.isfinite(values) & (values >= 0)).all():
            raise self._fail("has a count that is no number from 0 on; make the file again", name)
        return _Entry(offsets[sums.name], sums.n_elements, np.rint(values.astype(np.float64)))

    # -- the older form ------------------------------------------------------------------------------

    def _parse_old(self) -> Iterator[tuple[str, _Entry]]:
        size = self.state.n_bytes
        n_entries, at = self._i32(0) if size >= 4 else 0, 4
        if not 1 <= n_entries <= (size - 4) // MIN_ENTRY_BYTES:
            head = self._file.read(512, 0)
            remedy = "give what llama-imatrix wrote"
            raise self._fail(describe_foreign(head, "llama-imatrix", remedy))
        if n_entries > MAX_TENSORS:
            raise self._fail(
                f"claims {n_entries} tensors, the most are {MAX_TENSORS}; get the file again"
            )
        seen: set[str] = set()
        for _ in range(n_entries):
            name = self._text(at, MAX_NAME_BYTES)
            if name in seen:
                raise self._fail("stands in the file twice; make it again", name)
            seen.add(name)
            at += 4 + len(name.encode())
            n_calls, n_values = self._i32(at), self._i32(at + 4)
            at += 8
            if not 1 <= n_values <= (size - at) // 4:
                raise self._fail(
                    f"claims {n_values} values, which the file does not hold; get it again", name
                )
            # ggml takes the sums as they are where nothing was counted
            yield name, _Entry(at, n_values, np.array([max(1, n_calls)], np.float64))
            at += 4 * n_values
        if size - at >= 8:  # what it was made of need not be there
            self.n_chunks = max(0, self._i32(at))
            if 0 < self._i32(at + 4) <= min(size - at - 8, MAX_DATASET_BYTES):
                self.dataset = self._text(at + 4, MAX_DATASET_BYTES)

    def _i32(self, at: int) -> int:
        raw = self._file.read(4, at)
        if len(raw) < 4:
            raise self._fail("is cut off; get it again")
        return int(struct.unpack("<i", raw)[0])

    def _text(self, at: int, max_bytes: int) -> str:
        length = self._i32(at)
        raw = self._file.read(length, at + 4) if 0 < length <= max_bytes else b""
        if not raw or len(raw) < length or b"\0" in raw:
            raise self._fail(f"has a name of {length} bytes that cannot be; get it again")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self._fail(f"has a name that is not UTF-8: {raw[:40]!r}; get it again") from None

    # -- both ----------------------------------------------------------------------------------------

    def _check_values(self, name: str) -> None:
        """Refuse sums of squares that are none: the encoders would make nonsense of them."""
        entry = self._entries[name]
        for start in range(0, entry.n_values, CHUNK // 4):
            values = np.empty(min(CHUNK // 4, entry.n_values - start), np.float32)
            offset = entry.offset + 4 * start
            self._file.fill([values.data.cast("B")], offset, name)
            good = (values >= 0) & (values <= LARGEST)
            if not good.all():
                raise self._fail(
                    f"has the importance {values[~good][0]:g}; make the file again", name
                )

    def _checksum(self) -> int:
        crc, at = 0, 0
        while raw := self._file.read(CHUNK, at):
            crc = zlib.crc32(raw, crc)
            at += len(raw)
        return crc
