"""A connection to a store through fsspec, over which files are read by ranges; in this process.

Over SFTP one question brings 32 KiB, so that many are asked ahead of what is read: `AHEAD` bytes, of all open
files together. They are received into this process, so they count in its budget.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from edgemerge.errors import RecipeError
from edgemerge.remote.failures import Fault, Refusal
from edgemerge.remote.ranged import CHANGED, Identity
from edgemerge.remote.stores.address import EXTRA, KNOWN, SFTP, StoreAddress

__all__ = ["AHEAD", "StoreLink"]

AHEAD = 1 << 20  # bytes
MAX_OPEN = 8  # files
PATIENCE = 0.05  # seconds
LOGIN = ("username", "password")
MARKS = ("ETag", "etag", "VersionId", "version_id", "generation")
DATES = ("mtime", "LastModified", "last_modified", "modified", "modify", "updated")


@dataclass(slots=True)
class _Open:
    path: str
    file: Any
    at: int  # byte that is read next
    asked: int  # up to which byte answers are on the way


class StoreLink:
    """A connection that is made when it is wanted, and again after `close`.

    Attributes
    ----------
    lock : Condition
        For who calls `look` and `read`; `cut` may be called meanwhile.
    """

    def __init__(self, address: StoreAddress) -> None:
        self.lock = threading.Condition()
        self._address = address
        self._store: Any = None
        self._open: list[_Open] = []  # the last used last

    def look(self, path: str) -> Identity | None:
        """Return by what a file is known; None where there is none.

        Raises
        ------
        RecipeError
            A package is missing.
        Refusal
            The store refuses it.
        Exception
            As the store's package has them; it may pass.
        """
        try:
            store = self._connect()
            try:
                store.invalidate_cache()  # of lists of folders, which some packages keep
                found = store.info(path)
            except (FileNotFoundError, NotADirectoryError):
                return None
        except PermissionError:
            raise Refusal("may not be read; check your access") from None
        if found["type"] == "directory":
            return None
        if not isinstance(n_bytes := found["size"], int):
            raise Refusal("comes from a store that does not say its size; give a path")
        mark = next((found[key] for key in MARKS if found.get(key)), None)
        date = next((found[key] for key in DATES if found.get(key)), None)
        return Identity(n_bytes, mark and str(mark), date and str(date))

    def read(self, path: str, identity: Identity, view: memoryview, offset: int, stop: int) -> None:
        """Fill a view; up to `stop` more is probably read in order.

        Raises
        ------
        RecipeError, Refusal, Exception
            As of `look`.
        """
        opened = self._take(path, identity, offset)
        if hasattr(opened.file, "ask"):
            self._ask_ahead(opened, offset, offset + len(view), stop)
        n_read = 0
        while n_read < len(view):
            if not (n_more := opened.file.readinto(view[n_read:])):
                raise Fault("the file ended early")
            n_read += n_more
        opened.at = offset + n_read
        self.lock.notify_all()

    def forget(self, path: str, offset: int, n_bytes: int) -> None:
        """Close files whose next bytes are of a range."""
        for opened in list(self._open):
            if opened.path == path and offset <= opened.at < offset + n_bytes:
                self._close_file(opened)

    def cut(self) -> None:
        """Make a read that waits in another thread end, where the store's package can."""
        if hasattr(store := self._store, "cut"):
            store.cut()

    def close(self) -> None:
        """Close all; the next question opens a connection anew."""
        self.cut()
        while self._open:
            self._close_file(self._open[0])
        self._store = None

    def _connect(self) -> Any:
        if self._store is None:
            self._store = _open_store(self._address)
        return self._store

    def _take(self, path: str, identity: Identity, offset: int) -> _Open:
        """Return an open file whose next byte is the wanted one."""
        if self._find(path, offset) is None and self._is_near(path, offset):
            self.lock.wait_for(lambda: not self._is_near(path, offset), PATIENCE)
        found = self._find(path, offset) or self._find_free(path)
        if found is None:
            found = _Open(path, self._open_file(path, identity), offset, offset)
            self._open.append(found)
        if found.at != offset:
            found.at = found.asked = offset
        if hasattr(found.file, "seek"):
            found.file.seek(offset)
        self._open.append(self._open.pop(self._open.index(found)))
        return found

    def _find(self, path: str, offset: int) -> _Open | None:
        return next((one for one in self._open if one.path == path and one.at == offset), None)

    def _is_near(self, path: str, offset: int) -> bool:
        """Tell whether a byte is on its way, and another thread is about to read what comes before."""
        return any(one.path == path and one.at < offset < one.asked for one in self._open)

    def _find_free(self, path: str) -> _Open | None:
        """Return an open file of which nothing is on its way."""
        return next((one for one in self._open if one.path == path and one.asked <= one.at), None)

    def _open_file(self, path: str, identity: Identity) -> Any:
        """Open a file, and see that it is still the same."""
        if (now := self.look(path)) is None:
            raise Refusal("is not there any more; check the address")
        if now != identity:
            raise Refusal(CHANGED)
        if len(self._open) == MAX_OPEN:
            self._close_file(self._open[0])
        return self._connect().open(path, "rb", cache_type="none")

    def _ask_ahead(self, opened: _Open, offset: int, needed: int, stop: int) -> None:
        """Ask for what is read now, up to `needed`, and for more of it as there is room."""
        waiting = sum(max(0, one.asked - one.at) for one in self._open if one is not opened)
        until = min(stop, max(needed, offset + AHEAD - waiting))
        if until > opened.asked:
            opened.file.ask(opened.asked, until)
            opened.asked = until

    def _close_file(self, opened: _Open) -> None:
        self._open.remove(opened)
        with suppress(Exception):  # it may be that the connection was lost
            opened.file.close()


def _open_store(address: StoreAddress) -> Any:
    """Return fsspec's file system for an address, with a connection of its own."""
    try:
        if address.scheme in SFTP:
            from edgemerge.remote.stores.sftp import open_sftp

            return open_sftp(address)
        kind = _find_kind(address.scheme)
    except ImportError as error:
        # fsspec's own sentence names the package that it lacks.
        remedy = str(error) if error.name is None else f"{error.name} is missing: {EXTRA}"
        raise RecipeError(f"{address} cannot be read: {remedy}") from None
    login = {} if address.login is None else dict(zip(LOGIN, address.login, strict=True))
    settings = kind._get_kwargs_from_urls(str(address)) | login
    return kind(**settings, skip_instance_cache=True)


def _find_kind(scheme: str) -> Any:
    from fsspec import get_filesystem_class

    try:
        return get_filesystem_class(scheme)
    except ValueError:
        raise RecipeError(
            f"an address begins with {scheme}://, which fsspec does not know; {KNOWN}"
        ) from None
