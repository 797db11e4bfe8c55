"""What carries a registry: a folder, a web server, an S3 bucket or another store. None of them is trusted."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import BinaryIO, Protocol

from edgemerge.errors import FormatError, RecipeError
from edgemerge.formats.files import read_bounded
from edgemerge.remote.any_address import read_any_address
from edgemerge.remote.stand_ins import is_address
from edgemerge.remote.visits import Visit, visit
from edgemerge.suggestions import suggest_path
from edgemerge.types import Progress

__all__ = ["Carrier", "open_carrier"]

PIECE = 1 << 20


class Carrier(Protocol):
    """Files by their paths in the registry; each method raises FormatError where one cannot be read."""

    def where(self, name: str) -> str:
        """Say where a file is, for people."""

    def read_small(self, name: str, max_bytes: int) -> bytes | None:
        """Read a file of at most `max_bytes`; None where it is not there."""

    def fetch_rest(self, name: str, file: BinaryIO, n_bytes: int, progress: Progress) -> None:
        """Append to a file what it lacks of one of `n_bytes`, or begin it anew; never more than that."""

    def close(self) -> None:
        """End connections."""


def open_carrier(address: str) -> Carrier:
    """Open what carries a registry.

    Parameters
    ----------
    address : str
        Path of a folder, or an address: http(s)://, s3://, sftp:// or another store.

    Raises
    ------
    FormatError
        There is no such folder.
    RecipeError
        It is no address, or an extra is missing.
    """
    if not is_address(address):
        return _Folder(Path(address))
    if address.lower().startswith("hf:"):
        raise RecipeError(
            f"{address}: a registry is read from a folder, http(s)://, s3:// or sftp://; give one of these"
        )
    host = address.partition("://")[2]
    return _Remote(address if "/" in host else f"{address}/")  # as of a bucket alone


class _Folder:
    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            hint = suggest_path(folder) or "; check the path"
            raise FormatError(f"there is no registry: no such folder{hint}", path=folder)
        self._folder = folder

    def where(self, name: str) -> str:
        return str(self._folder / name)

    def read_small(self, name: str, max_bytes: int) -> bytes | None:
        path = self._folder / name
        return read_bounded(path, max_bytes) if path.is_file() else None

    def fetch_rest(self, name: str, file: BinaryIO, n_bytes: int, progress: Progress) -> None:
        path = self._folder / name
        if not path.is_file():
            raise FormatError("is not there; the registry was not copied whole", path=path)
        at = file.seek(0, os.SEEK_END)
        fd = _open(path)
        try:
            while at < n_bytes and (raw := _read(fd, path, at, min(PIECE, n_bytes - at))):
                file.write(raw)
                at += len(raw)
                progress(at, n_bytes)
        finally:
            os.close(fd)

    def close(self) -> None:
        pass


class _Remote:
    def __init__(self, address: str) -> None:
        self._address = read_any_address(address)
        self._visit: Visit = visit(self._address)

    def where(self, name: str) -> str:
        return str(self._address.inside(name))

    def read_small(self, name: str, max_bytes: int) -> bytes | None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "file")
            self._visit.fetch_small(self._address.inside(name), path, max_bytes)
            return path.read_bytes() if path.exists() else None

    def fetch_rest(self, name: str, file: BinaryIO, n_bytes: int, progress: Progress) -> None:
        self._visit.fetch_rest(self._address.inside(name), file, n_bytes, progress)

    def close(self) -> None:
        self._visit.close()


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _unreadable(path, error) from error


def _read(fd: int, path: Path, offset: int, n_bytes: int) -> bytes:
    try:
        return os.pread(fd, n_bytes, offset)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> FormatError:
    return FormatError(f"cannot be read ({error.strerror}); see to the disk or stick", path=path)
