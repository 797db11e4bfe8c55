"""A file on a server, read by ranges from many threads, as `preadv` reads one on this machine.

A tensor is read in order, block by block. So one request asks for all that is left of it, and blocks are
taken from its answer as they are wanted. Meanwhile the system receives what comes next, at most what its
socket buffer holds: that is the read-ahead, and takes nothing of the process. A block goes from the socket
into the buffers that it is for.
"""

from __future__ import annotations

import http.client
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import BinaryIO, TypeVar

from edgemerge.errors import FormatError, Stopped
from edgemerge.remote.address import Address
from edgemerge.remote.answers import (
    CUT_OFF,
    OTHER_BYTES,
    read_length,
    read_marks,
    read_range,
    receive_whole,
)
from edgemerge.remote.any_address import AnyAddress
from edgemerge.remote.failures import (
    PASSING,
    Fault,
    Refusal,
    next_delay,
    refuse_disk,
    refuse_status,
)
from edgemerge.remote.link import Link, Route
from edgemerge.remote.ranged import CHANGED, PIECE, Identity, RangedFile
from edgemerge.remote.spill import Spill
from edgemerge.types import Progress

__all__ = ["RemoteFile", "fetch_rest", "fetch_small", "probe"]

T = TypeVar("T")

STREAMED = 1 << 17  # bytes of a first read after which more of the same is expected
REACH = 4  # blocks before the wanted one that another thread may be about to read
PATIENCE = 0.02  # seconds to wait for that
MAX_LINKS = 8  # of one file
LINK_BYTES = 192 << 10  # of memory for a connection: TLS, and Python's objects


@dataclass(slots=True)
class _Stream:
    """A connection, and how far the answer that comes over it was read."""

    link: Link
    at: int  # byte of the file that comes next
    goal: int = 0  # byte where the present read ends
    stop: int = 0  # where the answer ends
    response: http.client.HTTPResponse | None = None
    in_order: bool = False  # whether it was read on from where it was


class RemoteFile(RangedFile):
    """A file at http:// or https://; see `RangedFile`. Its identity is that of `probe`."""

    work_bytes = LINK_BYTES

    def __init__(self, address: Address, identity: Identity, spill: Spill | None = None) -> None:
        super().__init__(address, identity, spill)
        self._route = Route(address, works=True)
        self._idle: list[_Stream] = []  # the last used last
        self._busy: list[_Stream] = []
        self._changed = threading.Condition()

    @classmethod
    def reopen(cls, address: AnyAddress, identity: Identity) -> RemoteFile:
        """Return the same file, with connections of its own."""
        assert isinstance(address, Address)
        return cls(address, identity)

    def forget(self, offset: int, n_bytes: int) -> None:
        """Give back what is kept of a range, and the connections whose answers are of it."""
        with self._changed:
            for stream in self._idle:
                if offset <= stream.at < offset + n_bytes and stream.response is not None:
                    stream.link.close()
                    stream.response = None
        super().forget(offset, n_bytes)

    def check_unchanged(self) -> None:
        """Do nothing: every answer of the server was compared."""

    def stop(self) -> None:
        """Make reads raise `Stopped`, those that wait as well as later ones, until `start`."""
        super().stop()
        with self._changed:
            for stream in self._busy:
                stream.link.cut()
            self._changed.notify_all()

    def close(self) -> None:
        """Close all connections, and give back what is kept."""
        super().close()
        with self._changed:
            for stream in self._idle:
                stream.link.close()
            self._idle.clear()

    def _receive_all(self, buffers: list[memoryview], offset: int, run: tuple[int, int]) -> None:
        stream = self._take(offset, sum(map(len, buffers)))
        try:
            self._read(stream, buffers, run)
        except BaseException:
            stream.link.close()
            stream.response = None
            raise
        finally:
            with self._changed:
                self._busy.remove(stream)
                self._idle.append(stream)
                self._changed.notify_all()

    # -- streams -------------------------------------------------------------------------------------

    def _take(self, offset: int, n_bytes: int) -> _Stream:
        """Return a stream that goes on at a byte, or one that is free for it."""
        near = range(offset - REACH * n_bytes, offset)
        with self._changed:
            is_patient = True
            while True:
                if self._stopped.is_set():
                    raise Stopped
                found = next((s for s in self._idle if s.at == offset), None)
                if found is not None:
                    break
                if any(s.goal == offset for s in self._busy):  # another thread reads what is before
                    self._changed.wait()
                elif is_patient and any(
                    s.response is not None and s.at in near for s in self._idle
                ):
                    is_patient = self._changed.wait(PATIENCE)  # or is about to
                else:
                    break
            if found is not None:
                self._idle.remove(found)
                found.in_order = True
            else:
                found = self._free_stream(offset)
            found.goal = offset + n_bytes
            self._busy.append(found)
            return found

    def _free_stream(self, offset: int) -> _Stream:
        """Take a connection over which no answer is coming, else a new one in the place of the oldest."""
        done = [stream for stream in self._idle if stream.response is None]
        if not done and len(self._idle) + len(self._busy) >= MAX_LINKS and self._idle:
            done = [self._idle[0]]
        if not done:
            return _Stream(Link(self._route), offset)
        stream = done[-1]
        self._idle.remove(stream)
        if stream.response is not None:
            stream.link.close()
        return _Stream(stream.link, offset)

    def _read(self, stream: _Stream, buffers: list[memoryview], run: tuple[int, int]) -> None:
        tries = 0
        for whole in buffers:
            view = whole
            while view:
                if self._stopped.is_set():
                    raise Stopped
                try:
                    n_read = self._receive(stream, view[:PIECE], run)
                    view, tries = view[n_read:], 0
                except Refusal as error:
                    raise self._fail(str(error)) from None
                except PASSING as error:
                    stream.link.close()
                    stream.response = None
                    self._wait(error, tries)
                    tries += 1

    def _receive(self, stream: _Stream, view: memoryview, run: tuple[int, int]) -> int:
        if stream.response is None:
            self._ask(stream, run)
        assert stream.response is not None
        n_read = stream.response.readinto(view[: stream.stop - stream.at])
        if n_read == 0:
            raise Fault(CUT_OFF)
        stream.at += n_read
        if stream.at == stream.stop:
            stream.response = None
        return n_read

    def _ask(self, stream: _Stream, run: tuple[int, int]) -> None:
        """Ask for the rest of a run where it is read in order, else for what is wanted now alone."""
        is_first = stream.at == run[0] and stream.goal - stream.at >= STREAMED
        in_order = stream.in_order or is_first
        last = run[1] if in_order and run[0] <= stream.at < run[1] else stream.goal
        last = min(max(last, stream.goal), self.identity.n_bytes)
        response = stream.link.ask(stream.at, last)
        is_other = self.identity.differs(*read_marks(response))
        if (is_other and response.status in (200, 206)) or response.status in (412, 416):
            raise Refusal(CHANGED)
        first, end, n_bytes = read_range(response)
        if n_bytes != self.identity.n_bytes:
            raise Refusal(CHANGED)
        if first != stream.at or end > last:
            raise Refusal(OTHER_BYTES)
        stream.response, stream.stop = response, end


def probe(address: Address) -> Identity:
    """Ask how large a file is, and by what it is known again.

    Raises
    ------
    FormatError
        It cannot be read by ranges, or is empty.
    """

    def read(response: http.client.HTTPResponse) -> Identity:
        if response.status == 416:
            raise Refusal("is empty; get another")
        n_bytes = read_range(response)[2]
        response.read(PIECE)
        return Identity(n_bytes, *read_marks(response))

    return _ask_once(address, 1, read)


def fetch_small(address: Address, path: Path, max_bytes: int, *, is_listed: bool = False) -> None:
    """Fetch a file as a whole, if it is there.

    Parameters
    ----------
    address : Address
        Of the file.
    path : Path
        Where it is written.
    max_bytes : int
        Its largest size.
    is_listed : bool
        Whether the server has said that it is there.

    Raises
    ------
    FormatError
        It cannot be read, has more than `max_bytes`, or is listed and not there.
    OutputError
        There is no room for it.
    """

    def read(response: http.client.HTTPResponse) -> None:
        # 403: of a store whose files may not be listed
        if response.status in (403, 404, 410) and not is_listed:
            return
        if response.status not in (200, 206, 416):  # 416: it is empty
            raise refuse_status(response.status, response.headers.get("Retry-After"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("wb", buffering=0)  # so that closing it writes nothing
        except OSError as error:
            raise refuse_disk(error, path.parent) from None
        with file:
            if response.status != 416:
                receive_whole(response, file, path.parent, max_bytes)

    _ask_once(address, max_bytes + 1, read)


def fetch_rest(address: Address, file: BinaryIO, n_bytes: int, progress: Progress) -> None:
    """Append to a file what it lacks of one on a server, or all of it where that sends no ranges.

    Parameters
    ----------
    address : Address
        Of the file.
    file : file
        Open to read and write; what is in it is taken for the first bytes of the other.
    n_bytes : int
        Size of the whole; no more is ever written.
    progress : callable
        Called with bytes done and `n_bytes`.

    Raises
    ------
    FormatError
        It cannot be had, or has another size.
    """
    link, response, tries, is_first = Link(Route(address)), None, 0, True
    at = furthest = file.seek(0, os.SEEK_END)
    try:
        while at < n_bytes:
            try:
                if response is None:
                    response = link.ask(at, n_bytes)
                    at = _place_answer(response, at, n_bytes)
                raw = response.read(min(PIECE, n_bytes - at))
                if not raw:
                    raise Fault(CUT_OFF)
            except Refusal as error:
                raise FormatError(str(error), path=str(address)) from None
            except PASSING as error:
                link.close()
                response = None
                time.sleep(next_delay(error, tries, address, is_first=is_first))
                tries += 1
                continue
            is_first = False
            file.seek(at)
            file.truncate()  # where all of it comes again
            file.write(raw)
            at += len(raw)
            if at > furthest:
                furthest, tries = at, 0
            progress(at, n_bytes)
    finally:
        link.close()


def _place_answer(response: http.client.HTTPResponse, at: int, n_bytes: int) -> int:
    """Return the byte with which an answer begins: the one asked for, or the first; check the size."""
    if response.status == 200:
        at, stated = 0, read_length(response)
        found = n_bytes if stated is None else stated
    else:
        if response.status == 416:
            raise Refusal(f"is shorter than the {n_bytes} bytes that it should have; get it again")
        first, _, found = read_range(response)
        if first != at:
            raise Refusal(OTHER_BYTES)
    if found != n_bytes:
        raise Refusal(f"has {found} bytes and should have {n_bytes}; it is damaged, or another")
    return at


def _ask_once(address: Address, n_bytes: int, read: Callable[[http.client.HTTPResponse], T]) -> T:
    """Ask for a file's first bytes, and read the answer; try again what may pass."""
    link = Link(Route(address))
    try:
        for tries in count():
            try:
                return read(link.ask(0, n_bytes))
            except Refusal as error:
                raise FormatError(str(error), path=str(address)) from None
            except PASSING as error:
                link.close()
                time.sleep(next_delay(error, tries, address, is_first=True))
        raise AssertionError
    finally:
        link.close()
