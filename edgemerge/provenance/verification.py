"""Whether a merged file is what was written: the checksums of its tensors, against its provenance.

What `edgemerge.merging.run` writes has a CRC-32 of every tensor (`edgemerge.tensor_crc32`, in the order of
the tensors). That finds what disks, cards and transfers do to a file. It proves nothing against people, who
can change the checksums too. It does not cover the metadata. A signature (`edgemerge.provenance.signature`)
covers every byte. The first weights of a directory state the same checksums, of rows in GGUF's order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from isal.isal_zlib import crc32, crc32_combine

from edgemerge.errors import VerificationError
from edgemerge.formats import open_model
from edgemerge.formats.gguf.metadata import Array, get_value
from edgemerge.formats.gguf.model import GgufModel
from edgemerge.formats.inspection import Provenance, read_provenance
from edgemerge.types import Progress, Source, TensorSpec, UInt8

if TYPE_CHECKING:
    from edgemerge.formats.hub.model import HubModel

__all__ = ["Verification", "has_provenance", "verify_model"]

CHECKSUMS_KEY = "edgemerge.tensor_crc32"
PIECE = 1 << 20  # bytes of a tensor that one thread reads at a time
PIECES_AHEAD = 4  # for each thread, so that none waits for the slowest


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found in a merged file.

    Attributes
    ----------
    files : tuple of Path
        The file, or those of a split.
    provenance : Provenance
        What the file says of its making.
    tensors, nbytes : int
        Tensors that were read, and their bytes.
    damaged : tuple of str
        Tensors whose checksum is not the one that was written.
    trailing_bytes : int
        Bytes after the last tensor, which no merge writes.
    """

    files: tuple[Path, ...]
    provenance: Provenance
    tensors: int
    nbytes: int
    damaged: tuple[str, ...]
    trailing_bytes: int

    @property
    def is_sound(self) -> bool:
        """Whether all is as it was written."""
        return not self.damaged and not self.trailing_bytes

    def check(self) -> None:
        """Do nothing if all is as it was written.

        Raises
        ------
        VerificationError
            It is not; the damaged tensors are named.
        """
        path = self.files[0]
        if self.damaged:
            named = ", ".join(repr(name) for name in self.damaged[:4])
            more = f" and {len(self.damaged) - 4} more" if len(self.damaged) > 4 else ""
            raise VerificationError(
                f"{len(self.damaged)} of {self.tensors} tensors changed since the merge "
                f"({named}{more}); get the file again, or merge again",
                path=path,
            )
        if self.trailing_bytes:
            raise VerificationError(
                f"has {self.trailing_bytes} bytes after its last tensor, which no merge wrote; "
                "get the file again",
                path=path,
            )


def has_provenance(path: str | os.PathLike[str]) -> bool:
    """Tell whether a model says that edgemerge merged it; reads the header alone.

    Raises
    ------
    FormatError
        It is no model, or its header is damaged.
    """
    with closing(open_model(path)) as source:
        return read_provenance(source.metadata()) is not None


def verify_model(
    path: str | os.PathLike[str], *, threads: int = 1, progress: Progress | None = None
) -> Verification:
    """Read all tensors of a merged file, and compare their checksums with those it states.

    Parameters
    ----------
    path : path
        A GGUF that edgemerge wrote, of a split any part; or a directory.
    threads : int
        How many read at a time, with `PIECE` bytes of memory each.
    progress : callable, optional
        Called with bytes done and bytes in all, from this thread.

    Raises
    ------
    FormatError
        It is no model, or its header is damaged.
    VerificationError
        It says nothing of its making, so nothing can be compared.
    """
    source = open_model(path)
    with closing(source):
        tensors = _stored_tensors(source)
        provenance, stated = _read_claims(source, tensors.specs)
        found = _read_checksums(tensors, threads, progress)
        return Verification(
            files=tuple(tensors.files),
            provenance=provenance,
            tensors=len(found),
            nbytes=sum(spec.nbytes for spec in tensors.specs.values()),
            damaged=tuple(name for name, crc32 in found.items() if crc32 != stated[name]),
            trailing_bytes=tensors.trailing_bytes,
        )


class _Stored(NamedTuple):
    """The tensors of a model as its files have them."""

    files: Sequence[Path]
    specs: Mapping[str, TensorSpec]
    read: Callable[[_Piece], UInt8]
    forget: Callable[[str], None]
    trailing_bytes: int
    by_rows: bool  # whether a piece has to be whole rows


def _stored_tensors(source: Source) -> _Stored:
    if isinstance(source, GgufModel):
        return _Stored(
            source.files(),
            source.specs(),
            partial(_read_bytes, source),
            source.forget,
            source.trailing_bytes,
            by_rows=False,
        )
    from edgemerge.formats.hub.model import HubModel  # a GGUF does not pay for the import

    assert isinstance(source, HubModel)
    specs = source.stored_specs()
    shards = [state.path for state in source.states()]  # a file with more bytes cannot be opened
    read = partial(_read_rows, source, specs)
    return _Stored(shards, specs, read, source.forget, 0, by_rows=True)


def _read_bytes(source: GgufModel, piece: _Piece) -> UInt8:
    raw_u8 = np.empty(piece.nbytes, np.uint8)
    source.read_bytes(piece.name, piece.start, raw_u8)
    return raw_u8


def _read_rows(source: HubModel, specs: Mapping[str, TensorSpec], piece: _Piece) -> UInt8:
    row_bytes = specs[piece.name].row_bytes
    start, raw_u8 = piece.start // row_bytes, np.empty(piece.nbytes, np.uint8)
    source.read_stored(piece.name, start, start + piece.nbytes // row_bytes, raw_u8)
    return raw_u8


def _read_claims(
    source: Source, specs: Mapping[str, TensorSpec]
) -> tuple[Provenance, dict[str, int]]:
    """Read what the file says of its making, and of the checksum of every tensor."""
    provenance = read_provenance(source.metadata())
    if provenance is None:
        raise VerificationError(
            "has no provenance section, so edgemerge did not write it and its tensors cannot be "
            "checked; its structure is sound",
            path=source.path,
        )
    checksums = get_value(source.metadata(), CHECKSUMS_KEY)
    names = list(specs)
    if not isinstance(checksums, Array) or len(checksums) != len(names):
        count = len(checksums) if isinstance(checksums, Array) else "no"
        raise VerificationError(
            f"states {count} checksums for {len(names)} tensors, so another program changed it "
            "since the merge; get the merged file",
            path=source.path,
        )
    return provenance, dict(zip(names, checksums, strict=True))  # type: ignore[arg-type]


def _read_checksums(tensors: _Stored, threads: int, progress: Progress | None) -> Mapping[str, int]:
    """Compute the CRC-32 of every tensor, from pieces that are read side by side."""

    def read(piece: _Piece) -> int:
        return crc32(tensors.read(piece).data)

    specs = tensors.specs
    found = dict.fromkeys(specs, 0)
    total, done = sum(spec.nbytes for spec in specs.values()), 0
    pieces = _cut(specs.values(), by_rows=tensors.by_rows)
    with ThreadPoolExecutor(threads, "edgemerge-verify") as pool:
        while batch := list(islice(pieces, PIECES_AHEAD * threads)):
            for piece, checksum in zip(batch, pool.map(read, batch), strict=True):
                found[piece.name] = crc32_combine(found[piece.name], checksum, piece.nbytes)
                if piece.is_last:
                    tensors.forget(piece.name)
                done += piece.nbytes
                if progress is not None:
                    progress(done, total)
    return found


class _Piece(NamedTuple):
    """Some bytes of a tensor."""

    name: str
    start: int
    nbytes: int
    is_last: bool


def _cut(specs: Iterable[TensorSpec], *, by_rows: bool) -> Iterator[_Piece]:
    """Cut tensors into pieces, in order."""
    for spec in specs:
        step = PIECE
        if by_rows:
            step = max(1, PIECE // max(1, spec.row_bytes)) * max(1, spec.row_bytes)
        for start in range(0, spec.nbytes, step):
            rest = spec.nbytes - start
            yield _Piece(spec.name, start, min(step, rest), rest <= step)
