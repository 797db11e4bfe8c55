"""Reading a registry: what it offers, verified, and files that appear only when they are right.

`Registry` verifies the index by a root that the caller trusts, and remembers the newest index that it saw.
A file is fetched beside its name, goes on where it stopped, and gets its name when size and hash agree.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from importlib.util import find_spec
from io import BufferedRandom, BufferedReader
from pathlib import Path

from edgemerge.errors import (
    FormatError,
    OutputError,
    RecipeError,
    RuntimeFailure,
    VerificationError,
)
from edgemerge.fleet.registry.carrier import open_carrier
from edgemerge.fleet.registry.entries import (
    Entry,
    newest,
    read_entry,
    target_path,
    version_key,
)
from edgemerge.machine.caches import users_cache
from edgemerge.output.file import finishing, sync_folder
from edgemerge.remote.any_address import read_any_address
from edgemerge.remote.stand_ins import is_address
from edgemerge.sizes import format_size
from edgemerge.suggestions import suggest
from edgemerge.types import Progress

__all__ = ["Entry", "Registry", "lock_state", "require_tuf", "state_folder"]


class Registry:
    """A registry, as one machine knows it.

    Parameters
    ----------
    address : str
        Folder, or address: http(s)://, s3://, sftp://.
    trust : Path
        Root metadata that the user trusts: the registry's 1.root.json, or a later one.
    state : Path
        Folder of what this machine has seen of the registry; see `state_folder`. Without it, old files
        that are not past their date cannot be told from new ones.
    now : datetime, optional
        With a zone, in place of the clock.

    Raises
    ------
    RuntimeFailure
        python-tuf is not installed.
    """

    def __init__(
        self, address: str, trust: Path, state: Path, *, now: datetime | None = None
    ) -> None:
        require_tuf()
        self._address, self._trust, self._state, self._now = address, trust, state, now
        self._entries: list[Entry] | None = None
        self._unread: dict[str, FormatError] = {}  # by path

    def refresh(self) -> None:
        """Read the newest index, and verify it.

        Raises
        ------
        VerificationError
            It is forged, older than one that was seen, past its date or mixed; or the root is none.
        FormatError, RecipeError
            It cannot be read.
        OutputError
            What was verified cannot be kept.
        """
        from edgemerge.fleet.registry.verified import METADATA, read_trust, update_index

        trust = read_trust(self._trust)
        with closing(open_carrier(self._address)) as carrier, lock_state(self._state):
            index = update_index(carrier, trust, self._state, self._now)
            where = carrier.where(f"{METADATA}/{index.targets.version}.targets.json")
        found, unread = [], {}
        for path, target in index.targets.targets.items():
            try:
                found.append(read_entry(path, target, where))
            except FormatError as error:  # one file must not keep a device from all others
                unread[path] = error
        self._entries = sorted(found, key=lambda e: (e.name, version_key(e.version)))
        self._unread = unread

    def note(self) -> str | None:
        """Say which entries were left out, where the index has such that cannot be read."""
        if not self._unread:
            return None
        return f"{next(iter(self._unread.values()))}; entries left out: {len(self._unread)}"

    def entries(self) -> list[Entry]:
        """List what the index offers, by name and version; `refresh` where that was not done.

        Raises
        ------
        VerificationError, FormatError, RecipeError, OutputError
            As of `refresh`.
        """
        if self._entries is None:
            self.refresh()
        assert self._entries is not None
        return list(self._entries)

    def find(self, name: str, version: str | None = None) -> Entry:
        """Find a file by its name, and its newest version that can be read where none is given.

        Raises
        ------
        RecipeError
            There is none.
        FormatError
            Its entry cannot be read.
        VerificationError, OutputError
            As of `refresh`.
        """
        offered = self.entries()
        named = [entry for entry in offered if entry.name == name]
        asked = [entry for entry in named if version in (None, entry.version)]
        if asked:
            return newest(asked)
        begin = f"{name}/" if version is None else f"{name}/{version}/"
        for path, error in self._unread.items():
            if path.startswith(begin):
                raise error
        if not named:
            names = sorted({entry.name for entry in offered})
            hint = suggest(name, names) if names else "it is empty"
            raise RecipeError(f"the registry has no {name!r}; {hint}")
        known = ", ".join(entry.version for entry in named)
        raise RecipeError(f"the registry has no version {version!r} of {name}; it has {known}")

    def fetch(self, entry: Entry, folder: Path, progress: Progress) -> Path:
        """Fetch a file, going on where an earlier call stopped, and return it verified.

        Parameters
        ----------
        entry : Entry
            Of `entries` or `find`.
        folder : Path
            Where the file is to lie, under `entry.file_name`.
        progress : callable
            Called with bytes done and bytes in all; may raise to stop.

        Raises
        ------
        VerificationError
            What came is not what the index names, or the index names no such file.
        FormatError
            It cannot be read.
        OutputError
            It cannot be written, or another file has its name.
        """
        from edgemerge.fleet.registry.verified import TARGETS

        if entry not in self.entries():
            raise VerificationError("is not what the index names; look again", path=entry.file_name)
        target = folder / entry.file_name
        if _is_there(target, entry):
            return target
        home, _, name = target_path(entry).rpartition("/")
        asked = f"{TARGETS}/{home}/{entry.sha256}.{name}"
        part = _part_of(target, entry)
        with closing(open_carrier(self._address)) as carrier, _open_part(part, target) as file:
            start = file.seek(0, os.SEEK_END)
            resumed = start > 0
            _see_to_room(file, entry.n_bytes - start, target)
            with _writing(target), _noting():
                carrier.fetch_rest(asked, file, entry.n_bytes, progress)
                if resumed and not _is_right(file, entry):  # what lay there may be damaged
                    file.truncate(0)
                    carrier.fetch_rest(asked, file, entry.n_bytes, progress)
            if not _is_right(file, entry):
                part.unlink()
                raise VerificationError(
                    "is not the file that the index names: cut short, damaged or forged; get it from "
                    "elsewhere",
                    path=carrier.where(asked),
                )
            with finishing(target):
                file.flush()
                os.fsync(file.fileno())
                os.replace(part, target)
                sync_folder(folder)
        return target


def require_tuf() -> None:
    """Raise RuntimeFailure where python-tuf is not installed."""
    if find_spec("tuf") is None or find_spec("cryptography") is None:
        raise RuntimeFailure(
            "a registry needs python-tuf: install it with pip install 'edgemerge[fleet]'"
        )


def state_folder(address: str) -> Path:
    """Say where this machine keeps what it has seen of a registry, unless told otherwise.

    Raises
    ------
    RecipeError
        It is an address that cannot be read.
    """
    shown = str(read_any_address(address)) if is_address(address) else os.path.realpath(address)
    shown = shown.rstrip("/")
    digest = hashlib.sha256(shown.encode(errors="surrogateescape")).hexdigest()[:16]
    word = re.sub(r"[^A-Za-z0-9.-]+", "-", shown.rpartition("/")[2])[:40]
    return users_cache() / "registries" / f"{word}-{digest}"


@contextmanager
def lock_state(state: Path) -> Iterator[None]:
    """Make the folder of what is known, for its owner alone, and be the only one who uses it.

    Raises
    ------
    OutputError
        It cannot be made.
    """
    with _writing(state):
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = (state / "lock").open("ab")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_there(target: Path, entry: Entry) -> bool:
    """Tell whether a file was fetched before.

    Raises
    ------
    OutputError
        Another one has its name.
    """
    if not os.path.lexists(target):
        return False
    if target.is_file():
        with _writing(target), target.open("rb") as file:
            if _is_right(file, entry):
                return True
    raise OutputError(
        "is another file than the registry's; move it away, or choose another folder", path=target
    )


def _part_of(target: Path, entry: Entry) -> Path:
    """Name what was fetched so far by its hash too, so that two files do not mix."""
    return target.with_name(f"{target.name}.{entry.sha256[:16]}.part")


@contextmanager
def _open_part(part: Path, target: Path) -> Iterator[BufferedRandom]:
    """Open what was fetched so far, for this process alone."""
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with _writing(target):
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            file = open(os.open(part, flags, 0o644), "r+b")  # noqa: SIM115 (`with` below)
        with file:
            if not _lock(file, part, target):  # another process has just finished it
                continue
            yield file
            return


def _lock(file: BufferedRandom, part: Path, target: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), part.stat())
    except BlockingIOError:
        raise OutputError("another fetch is at work; wait for that one", path=target) from None
    except FileNotFoundError:
        return False


def _see_to_room(file: BufferedRandom, n_bytes: int, target: Path) -> None:
    """Refuse what the disk has no room for, before it comes over a thin link."""
    disk = os.fstatvfs(file.fileno())
    if (missing := n_bytes - disk.f_bavail * disk.f_frsize) > 0:
        raise OutputError(
            f"needs {format_size(n_bytes)} and the disk lacks {format_size(missing)} of it; free some of "
            "the disk, or choose another folder",
            path=target,
        )


@contextmanager
def _noting() -> Iterator[None]:
    """Tell who is interrupted that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt as error:
        error.add_note("what came is kept; give the same command again, which goes on")
        raise


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot be written ({error.strerror}); free some of the disk, or choose another folder",
            path=path,
        ) from error


def _is_right(file: BufferedReader | BufferedRandom, entry: Entry) -> bool:
    if file.seek(0, os.SEEK_END) != entry.n_bytes:
        return False
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256
