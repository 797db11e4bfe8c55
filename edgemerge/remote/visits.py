"""Visits to servers: what is asked of one while the files of a model are found, whatever it speaks."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, Protocol

from edgemerge.remote.address import Address
from edgemerge.remote.any_address import AnyAddress
from edgemerge.remote.file import RemoteFile, fetch_rest, fetch_small, probe
from edgemerge.remote.ranged import RangedFile
from edgemerge.remote.spill import Spill
from edgemerge.remote.stores.address import S3, StoreAddress
from edgemerge.types import Progress

__all__ = ["Visit", "visit"]


class Visit(Protocol):
    """What is asked of a server until `close`; the files stay open.

    Each method raises FormatError where a file cannot be had, OutputError where there is no room for it, and
    RecipeError where an extra is missing.
    """

    def open_file(self, address: AnyAddress, spill: Spill | None) -> RangedFile:
        """Open a file that is there, and not empty."""

    def fetch_small(self, address: AnyAddress, path: Path, max_bytes: int) -> None:
        """Fetch a file as a whole, if it is there."""

    def fetch_rest(
        self, address: AnyAddress, file: BinaryIO, n_bytes: int, progress: Progress
    ) -> None:
        """Append to a file what it lacks of one of a known size."""

    def close(self) -> None:
        """End the visit."""


def visit(address: AnyAddress) -> Visit:
    """Begin a visit to where a model is.

    Raises
    ------
    RecipeError, RuntimeFailure
        An extra is missing, or does not work.
    """
    if isinstance(address, Address):
        return _Http()
    if address.scheme in S3:
        return _S3(address)
    return _Store(address)


class _Http:
    def open_file(self, address: AnyAddress, spill: Spill | None) -> RangedFile:
        assert isinstance(address, Address)
        return RemoteFile(address, probe(address), spill)

    def fetch_small(self, address: AnyAddress, path: Path, max_bytes: int) -> None:
        assert isinstance(address, Address)
        fetch_small(address, path, max_bytes)

    def fetch_rest(
        self, address: AnyAddress, file: BinaryIO, n_bytes: int, progress: Progress
    ) -> None:
        assert isinstance(address, Address)
        fetch_rest(address, file, n_bytes, progress)

    def close(self) -> None:
        pass


class _S3(_Http):
    """Asks for files by signed addresses."""

    def __init__(self, address: StoreAddress) -> None:
        from edgemerge.remote.stores.signing import Signer

        self._signer = Signer(address)

    def open_file(self, address: AnyAddress, spill: Spill | None) -> RangedFile:
        return super().open_file(self._sign(address), spill)

    def fetch_small(self, address: AnyAddress, path: Path, max_bytes: int) -> None:
        super().fetch_small(self._sign(address), path, max_bytes)

    def fetch_rest(
        self, address: AnyAddress, file: BinaryIO, n_bytes: int, progress: Progress
    ) -> None:
        super().fetch_rest(self._sign(address), file, n_bytes, progress)

    def _sign(self, address: AnyAddress) -> Address:
        assert isinstance(address, StoreAddress)
        return self._signer.sign(address)

    def close(self) -> None:
        self._signer.close()


class _Store:
    def __init__(self, address: StoreAddress) -> None:
        from edgemerge.remote.stores import file, link

        self._file, self._link = file, link.StoreLink(address)

    def open_file(self, address: AnyAddress, spill: Spill | None) -> RangedFile:
        assert isinstance(address, StoreAddress)
        identity = self._file.look(self._link, address)
        return self._file.StoreFile(address, identity, spill, self._link)

    def fetch_small(self, address: AnyAddress, path: Path, max_bytes: int) -> None:
        assert isinstance(address, StoreAddress)
        self._file.fetch_small(self._link, address, path, max_bytes)

    def fetch_rest(
        self, address: AnyAddress, file: BinaryIO, n_bytes: int, progress: Progress
    ) -> None:
        assert isinstance(address, StoreAddress)
        self._file.fetch_rest(self._link, address, file, n_bytes, progress)

    def close(self) -> None:
        """Leave the connection to the files; it ends with them."""
