"""Visits to servers: what is asked of one while the files of a model are found, whatever it speaks."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from edgemerge.remote.address import Address
from edgemerge.remote.any_address import AnyAddress
from edgemerge.remote.file import RemoteFile, fetch_small, probe
from edgemerge.remote.ranged import RangedFile
from edgemerge.remote.spill import Spill
from edgemerge.remote.stores.address import S3, StoreAddress

__all__ = ["Visit", "visit"]


class Visit(Protocol):
    """What is asked of a server until `close`; the files stay open.

    Each method raises FormatError where a file cannot be had, and RecipeError where an extra is missing.
    """

    def open_file(self, address: AnyAddress, spill: Spill | None) -> RangedFile:
        """Open a file that is there, and not empty."""

    def fetch_small(self, address: AnyAddress, path: Path, max_bytes: int) -> None:
        """Fetch a file as a whole, if it is there."""

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

    def close(self) -> None:
        """Leave the connection to the files; it ends with them."""
