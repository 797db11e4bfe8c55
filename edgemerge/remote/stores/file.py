"""A file in a store, read by ranges over a connection that all files of a model have in common."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import BinaryIO, TypeVar

from edgemerge.errors import EdgemergeError, FormatError, Stopped
from edgemerge.remote.any_address import AnyAddress
from edgemerge.remote.failures import Fault, Refusal, next_delay, refuse_disk
from edgemerge.remote.ranged import CHANGED, PIECE, Identity, RangedFile
from edgemerge.remote.spill import Spill
from edgemerge.remote.stores.address import StoreAddress
from edgemerge.remote.stores.link import AHEAD, StoreLink
from edgemerge.types import Progress

__all__ = ["StoreFile", "fetch_rest", "fetch_small", "look"]

T = TypeVar("T")


class StoreFile(RangedFile):
    """A file in a store; see `RangedFile`.

    Parameters
    ----------
    address, identity, spill
        As of `RangedFile`.
    link : StoreLink
        To the store.
    """

    work_bytes = AHEAD + 2 * PIECE  # what was asked ahead, and a piece on its way to its place

    def __init__(
        self, address: StoreAddress, identity: Identity, spill: Spill | None, link: StoreLink
    ) -> None:
        super().__init__(address, identity, spill)
        self._link, self._path = link, str(address)

    @classmethod
    def reopen(cls, address: AnyAddress, identity: Identity) -> StoreFile:
        """Return the same file, over a connection of its own."""
        assert isinstance(address, StoreAddress)
        return cls(address, identity, None, StoreLink(address))

    def _receive_all(self, buffers: list[memoryview], offset: int, run: tuple[int, int]) -> None:
        end = offset + sum(map(len, buffers))
        stop = max(run[1], end) if run[0] <= offset < run[1] else end
        stop = min(stop, self.identity.n_bytes)
        for whole in buffers:
            for start in range(0, len(whole), PIECE):
                view = whole[start : start + PIECE]
                self._receive(view, offset, stop)
                offset += len(view)

    def _receive(self, view: memoryview, offset: int, stop: int) -> None:
        link, path, identity = self._link, self._path, self.identity
        self._try(lambda: link.read(path, identity, view, offset, stop))

    def check_unchanged(self) -> None:
        """Raise FormatError where the file is another by now; a store does not say so in its answers."""
        if self._try(lambda: self._link.look(self._path)) != self.identity:
            raise self._fail(CHANGED)

    def _try(self, ask: Callable[[], T]) -> T:
        for tries in count():
            if self._stopped.is_set():
                raise Stopped
            try:
                return _ask(self._link, ask)
            except Exception as error:
                self._wait(_passing(error, self.address), tries)
        raise AssertionError

    def forget(self, offset: int, n_bytes: int) -> None:
        """Give back what is kept of a range, and what was asked ahead of it."""
        with self._link.lock:
            self._link.forget(self._path, offset, n_bytes)
        super().forget(offset, n_bytes)

    def stop(self) -> None:
        """Make reads raise `Stopped`, those that wait as well as later ones, until `start`."""
        super().stop()
        self._link.cut()

    def close(self) -> None:
        """Close the connection, and give back what is kept."""
        super().close()
        with self._link.lock:
            self._link.close()


def look(link: StoreLink, address: StoreAddress) -> Identity:
    """Ask how large a file is, and by what it is known again.

    Raises
    ------
    FormatError
        It is not there, cannot be read, or is empty.
    RecipeError
        A package is missing, or fsspec does not know the store.
    """
    found = _ask_first(address, link, lambda: link.look(str(address)))
    if found is None:
        raise FormatError("is not there; check the address", path=str(address))
    if not found.n_bytes:
        raise FormatError("is empty; get another", path=str(address))
    return found


def fetch_small(link: StoreLink, address: StoreAddress, path: Path, max_bytes: int) -> None:
    """Fetch a file as a whole, if it is there.

    Raises
    ------
    FormatError
        It cannot be read, or has more than `max_bytes`.
    OutputError
        There is no room for it.
    RecipeError
        As of `look`.
    """
    found = _ask_first(address, link, lambda: link.look(str(address)))
    if found is None:
        return
    if found.n_bytes > max_bytes:
        what = f"is larger than {max_bytes / 1e6:g} MB, which no such file is; get another"
        raise FormatError(what, path=str(address))
    raw = bytearray(found.n_bytes)
    StoreFile(address, found, None, link).fill([memoryview(raw)], 0, (0, 0))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
    except OSError as error:
        raise refuse_disk(error, path.parent) from None


def fetch_rest(
    link: StoreLink, address: StoreAddress, file: BinaryIO, n_bytes: int, progress: Progress
) -> None:
    """Append to a file what it lacks of one in a store; see `edgemerge.remote.file.fetch_rest`.

    Raises
    ------
    FormatError
        It cannot be had, or has another size.
    RecipeError
        As of `look`.
    """
    found = look(link, address)
    if found.n_bytes != n_bytes:
        what = f"has {found.n_bytes} bytes and should have {n_bytes}; it is damaged, or another"
        raise FormatError(what, path=str(address))
    remote, at = StoreFile(address, found, None, link), file.seek(0, os.SEEK_END)
    buffer = memoryview(bytearray(min(PIECE, n_bytes)))
    while at < n_bytes:
        piece = buffer[: n_bytes - at]
        remote.fill([piece], at, (at, n_bytes))
        file.write(piece)
        at += len(piece)
        progress(at, n_bytes)


def _ask_first(address: StoreAddress, link: StoreLink, ask: Callable[[], T]) -> T:
    """Ask a store something, before anything was read of it; try again what may pass."""
    for tries in count():
        try:
            return _ask(link, ask)
        except Exception as error:
            time.sleep(next_delay(_passing(error, address), tries, address, is_first=True))
    raise AssertionError


def _ask(link: StoreLink, ask: Callable[[], T]) -> T:
    with link.lock:
        try:
            return ask()
        except Exception:
            link.close()
            raise


def _passing(error: Exception, address: AnyAddress) -> Exception:
    """Return an error that may pass, without what its package may tell of a login; raise others."""
    match error:
        case EdgemergeError():
            raise error
        case Refusal():
            raise FormatError(str(error), path=str(address)) from None
        case Fault():
            return error
        case Exception() if type(error).__name__ == "error_perm":  # ftplib's
            raise FormatError("may not be read; check the login", path=str(address)) from None
        case OSError() if error.strerror or type(error).__module__ in ("builtins", "socket"):
            return error
    return Fault(type(error).__name__)
