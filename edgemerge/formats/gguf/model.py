"""Reading GGUF files, whole or split: metadata, and rows of tensors over `pread`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from edgemerge.errors import FormatError
from edgemerge.formats.byte_file import open_file
from edgemerge.formats.gguf.header import MAGIC, HeaderParser
from edgemerge.formats.gguf.metadata import get_value
from edgemerge.formats.gguf.split import (
    COUNT_KEY,
    NUMBER_KEY,
    TOTAL_KEY,
    find_parts,
    sibling_parts,
)
from edgemerge.formats.shared_tables import share_table
from edgemerge.types import FileState, TensorSpec, UInt8

__all__ = ["GgufFile", "GgufModel", "parts_of"]


class GgufFile:
    """One GGUF file (version 2 or 3, little-endian), whatever it holds.

    Raises
    ------
    FormatError
        The header breaks the format, or the file is not a GGUF at all.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = open_file(self.path)
        self.state = self._file.state
        try:
            if not self._file.is_regular:
                raise FormatError("is not a regular file; give a GGUF file", path=self.path)
            header = HeaderParser(self._file)
            self.metadata, specs, offsets = header.parse()
            self.specs, self._offsets = share_table(specs), share_table(offsets)
            self.trailing_bytes = header.trailing_bytes
            end = self.state.n_bytes - self.trailing_bytes
            self.holds_another = self._file.read(len(MAGIC), end) == MAGIC
        except BaseException:
            self._file.close()
            raise

    def read_rows(self, name: str, start: int, stop: int, out_u8: UInt8) -> None:
        """Fill `out_u8` with the stored bytes of rows [start, stop)."""
        row_bytes = self.specs[name].row_bytes
        assert out_u8.nbytes == (stop - start) * row_bytes
        self.read_bytes(name, start * row_bytes, out_u8)

    def read_bytes(self, name: str, start: int, out_u8: UInt8) -> None:
        """Fill `out_u8` with the stored bytes of a tensor from byte `start` on."""
        assert start + out_u8.nbytes <= self.specs[name].nbytes
        first = self._offsets[name]
        run = first, first + self.specs[name].nbytes
        self._file.fill([out_u8.data.cast("B")], first + start, name, run)

    def forget(self, name: str, n_rows: int | None = None) -> None:
        """Drop a tensor's pages, or its first rows', from the page cache, unless the file was in it."""
        spec = self.specs[name]
        n_bytes = spec.nbytes if n_rows is None else n_rows * spec.row_bytes
        self._file.forget(self._offsets[name], n_bytes)

    def check_unchanged(self) -> None:
        """Raise FormatError where the file was written to since it was opened."""
        self._file.check_unchanged()

    @property
    def work_bytes(self) -> int:
        """Bytes that a thread takes to read, beside what it reads into."""
        return self._file.work_bytes

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class GgufModel:
    """A model in one GGUF file, or in the files of a split, as a `Source`.

    Any part's path opens the whole. The parts are those of llama.cpp's gguf-split: the first has the
    metadata, and all state how many there are.

    Raises
    ------
    FormatError
        A header breaks the format, a part is missing, or the parts do not make a whole.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._parts: list[GgufFile] = []
        try:
            self._open()
            self._metadata = self._parts[0].metadata
            self.architecture = _architecture(self._parts[0])
        except BaseException:
            self.close()
            raise
        self._homes = {name: part for part in self._parts for name in part.specs}
        self._specs = {name: part.specs[name] for name, part in self._homes.items()}
        self.trailing_bytes = sum(part.trailing_bytes for part in self._parts)

    def _open(self) -> None:
        self._parts.append(GgufFile(self.path))
        count = _integer(self._parts[0], COUNT_KEY) or 0
        number = _integer(self._parts[0], NUMBER_KEY) or 0
        if count <= 1:
            return
        if self._parts[0].holds_another:
            raise FormatError(
                f"is a part of a split of {count} with another one joined to it, which is no model; get the "
                "parts and give the first, or join them with llama-gguf-split --merge",
                path=self.path,
            )
        for i, path in enumerate(find_parts(self.path, number, count)):
            if i != number:
                self._parts.append(GgufFile(path))
        self._parts.insert(number, self._parts.pop(0))
        _check_parts(self._parts)

    def specs(self) -> Mapping[str, TensorSpec]:
        """All tensors by name, in the order of the files."""
        return self._specs

    def metadata(self) -> Mapping[str, bytes]:
        """Key -> typed value, raw."""
        return self._metadata

    def notes(self) -> Sequence[str]:
        """Say nothing: all of a GGUF is read."""
        return ()

    def work_bytes(self) -> int:
        """Bytes that each thread takes to read rows: of files on this machine none."""
        return max(part.work_bytes for part in self._parts)

    def read_rows(self, name: str, start: int, stop: int, out_u8: UInt8) -> None:
        """Fill `out_u8` with the stored bytes of rows [start, stop)."""
        self._homes[name].read_rows(name, start, stop, out_u8)

    def read_bytes(self, name: str, start: int, out_u8: UInt8) -> None:
        """Fill `out_u8` with the stored bytes of a tensor from byte `start` on; a row may be huge."""
        self._homes[name].read_bytes(name, start, out_u8)

    def files(self) -> list[Path]:
        """Name the files, in order."""
        return [part.path for part in self._parts]

    def forget(self, name: str, n_rows: int | None = None) -> None:
        """Drop a tensor's pages, or its first rows', from the page cache, unless the file was in it."""
        self._homes[name].forget(name, n_rows)

    def states(self) -> Sequence[FileState]:
        """Return what the files were when they were opened."""
        return [part.state for part in self._parts]

    def check_unchanged(self) -> None:
        """Raise FormatError where a file was written to since it was opened."""
        for part in self._parts:
            part.check_unchanged()

    def close(self) -> None:
        """Close the files."""
        for part in self._parts:
            part.close()


def parts_of(path: Path) -> list[Path]:
    """List the files that belong together with a file of a model, itself included.

    A whole model may be called NAME-00001-of-00003.gguf: what the header says goes before the name. Of
    what cannot be read, the name is all there is.
    """
    named = sibling_parts(path)
    if len(named) == 1:
        return named
    try:
        with closing(GgufFile(path)) as file:
            return named if (_integer(file, COUNT_KEY) or 0) > 1 else [path]
    except (OSError, FormatError):
        return named


def _architecture(file: GgufFile) -> str:
    value = get_value(file.metadata, "general.architecture")
    if not isinstance(value, str) or not value:
        raise FormatError(
            "has no general.architecture, so it is no model; export it again with llama.cpp's converter",
            path=file.path,
        )
    return value


def _check_parts(parts: list[GgufFile]) -> None:
    """Refuse what llama.cpp refuses (`llama_model_loader`), and parts of splits of other lengths."""
    seen: set[str] = set()
    for i, part in enumerate(parts):
        stated = _integer(part, NUMBER_KEY), _integer(part, COUNT_KEY)
        if stated != (i, len(parts)):
            raise FormatError(
                f"does not state that it is part {i + 1} of {len(parts)}, as its name does; "
                "get all parts of one split",
                path=part.path,
            )
        if twice := seen & part.specs.keys():
            raise FormatError(
                "stands in another part too; get all parts of one split",
                path=part.path,
                tensor=min(twice),
            )
        seen |= part.specs.keys()
    if (total := _integer(parts[0], TOTAL_KEY)) != len(seen):
        raise FormatError(
            f"states {total} tensors in all its parts, which hold {len(seen)}; "
            "get all parts of one split",
            path=parts[0].path,
        )


def _integer(file: GgufFile, key: str) -> int | None:
    value = get_value(file.metadata, key)
    return value if isinstance(value, int) else None
