"""What files on other machines have in common: identity, what is kept of them, how reading stops."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

from edgemerge.errors import FormatError, Stopped
from edgemerge.remote.failures import next_delay

if TYPE_CHECKING:
    from edgemerge.remote.any_address import AnyAddress
    from edgemerge.remote.spill import Spill

__all__ = ["CHANGED", "PIECE", "Identity", "RangedFile"]

CHANGED = "was changed on the server while it was read; start again"
PIECE = 1 << 18  # bytes that a broken connection may cost


class Identity(NamedTuple):
    """What shows that a file is still the same."""

    n_bytes: int
    etag: str | None = None
    date: str | None = None  # of its last change

    def differs(self, etag: str | None, date: str | None) -> bool:
        """Tell whether these are another file's; what a server does not state is taken for the same."""
        if self.etag and etag:
            return etag != self.etag
        return bool(self.date and date and date != self.date)


class RangedFile(ABC):
    """A file on another machine, read by ranges from many threads; it does not change while it is read.

    Parameters
    ----------
    address : AnyAddress
        Of the file.
    identity : Identity
        Of what is there; of a file that cannot change, its size alone.
    spill : Spill, optional
        Where what was read is kept to be read again.
    """

    work_bytes: int  # of memory that a thread takes to read

    def __init__(self, address: AnyAddress, identity: Identity, spill: Spill | None) -> None:
        self.address, self.identity = address, identity
        self._spill = spill
        self._stopped = threading.Event()

    def fill(self, buffers: list[memoryview], offset: int, run: tuple[int, int]) -> None:
        """Fill buffers one after the other from byte `offset` on.

        Parameters
        ----------
        buffers : list of memoryview
            Of bytes.
        offset : int
            Where to begin.
        run : (int, int)
            First byte, and last + 1, of a run of bytes that are probably read in order.

        Raises
        ------
        FormatError
            The bytes cannot be had; `path` is the address.
        Stopped
            `stop` was called.
        """
        n_bytes = sum(map(len, buffers))
        if offset + n_bytes > self.identity.n_bytes:
            raise self._fail("ends before what is read of it; it is damaged, get another")
        if not n_bytes or (self._spill is not None and self._spill.read(buffers, offset)):
            return
        self._receive_all(buffers, offset, run)
        if self._spill is not None:
            self._spill.write(buffers, offset)

    @classmethod
    @abstractmethod
    def reopen(cls, address: AnyAddress, identity: Identity) -> RangedFile:
        """Return the same file for another process, which asks the server for itself."""

    @abstractmethod
    def _receive_all(self, buffers: list[memoryview], offset: int, run: tuple[int, int]) -> None:
        """Fill buffers from the server."""

    @abstractmethod
    def check_unchanged(self) -> None:
        """Raise FormatError where the file was changed and no answer has shown that."""

    def forget(self, offset: int, n_bytes: int) -> None:
        """Give back what is kept of a range."""
        if self._spill is not None:
            self._spill.forget(offset, n_bytes)

    def start(self) -> None:
        """Let reads go on after `stop`."""
        self._stopped.clear()

    def stop(self) -> None:
        """Make reads raise `Stopped`, those that wait as well as later ones, until `start`."""
        self._stopped.set()

    def close(self) -> None:
        """End all reads, and give back what is kept."""
        self.stop()
        if self._spill is not None:
            self._spill.close()

    def _wait(self, error: Exception, tries: int) -> None:
        """Wait before another try; raise FormatError where there is none."""
        if self._stopped.is_set():
            raise Stopped from None
        self._stopped.wait(next_delay(error, tries, self.address))

    def _fail(self, message: str) -> FormatError:
        return FormatError(message, path=str(self.address))
