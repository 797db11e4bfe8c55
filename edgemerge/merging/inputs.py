"""What shows that a worker of a cluster has the models and the versions that the client has."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from edgemerge.errors import FormatError
from edgemerge.formats.quants.imatrix import ImportanceMatrix
from edgemerge.output.journal import mark_file
from edgemerge.output.resume import PACKAGE, hash_sources
from edgemerge.remote.stand_ins import is_remote
from edgemerge.shown_paths import shown_path
from edgemerge.types import Source

__all__ = ["InputMark", "check_marks", "find_software", "mark_inputs"]

# What makes machine code, or adds up numbers. The processor does not matter: bytes agree across them.
PACKAGES = ("edgemerge", "llvmlite", "numba", "numpy")


@dataclass(frozen=True, slots=True)
class InputMark:
    """What a model or an importance matrix was on the client.

    Attributes
    ----------
    path : Path
        Of the file or folder.
    state : str
        Inodes, sizes and times of its files. Where these agree, so do the files.
    content : bytes
        Hash of its header and of one row of each tensor, to tell a copy from another model. It is empty
        for a model at an address, whose files a worker asks for by size and ETag.
    is_matrix : bool
        Whether it is an importance matrix.
    """

    path: Path
    state: str
    content: bytes
    is_matrix: bool = False


def find_software() -> dict[str, str]:
    """Return the versions that decide bytes, and a hash of the code that does."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    found["code"] = hash_sources(PACKAGE)
    return found


def mark_inputs(
    sources: Sequence[Source], matrices: Mapping[Path, ImportanceMatrix]
) -> tuple[InputMark, ...]:
    """Describe what a merge reads, for `check_marks` on other machines."""
    models = [InputMark(s.path, _state(s), _content(s)) for s in sources]
    return (
        *models,
        *(InputMark(path, "", _hash_file(path), is_matrix=True) for path in matrices),
    )


def check_marks(marks: Sequence[InputMark], sources: Sequence[Source]) -> None:
    """Compare what this process has opened with what the client has.

    Parameters
    ----------
    marks : sequence of InputMark
        From `mark_inputs`.
    sources : sequence of Source
        The models, in the same order.

    Raises
    ------
    FormatError
        A file is another one here.
    """
    models = [mark for mark in marks if not mark.is_matrix]
    for mark, source in zip(models, sources, strict=True):
        if mark.content and mark.state != _state(source) and mark.content != _content(source):
            raise _another(mark.path)
    for mark in marks:
        if mark.is_matrix and mark.content != _hash_file(mark.path):
            raise _another(mark.path)


def _another(path: Path) -> FormatError:
    return FormatError(
        f"is another file there than here; copy {shown_path(path)} to that machine, or let it see this one",
        path=path,
    )


def _state(source: Source) -> str:
    return repr([mark_file(state) for state in source.states()])


def _content(source: Source) -> bytes:
    if any(is_remote(state.path) for state in source.states()):
        return b""
    digest = hashlib.blake2b(digest_size=16)
    for key, value in source.metadata().items():
        digest.update(f"{key!r} {len(value)}\n".encode())
        digest.update(value)
    for spec in source.specs().values():
        digest.update(repr(spec).encode())
        row = spec.n_rows // 2
        raw = np.empty(spec.row_bytes, np.uint8)
        source.read_rows(spec.name, row, row + 1, raw)
        digest.update(raw.data)
    return digest.digest()


def _hash_file(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()
