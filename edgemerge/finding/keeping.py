"""Remote files that are kept on this machine, under the SHA-256 of what they hold.

In the folder are `sha256/HASH`, the files, and `known/KEY.json`, which of them an address had under which
ETag and date. What is fetched so far of a file is `begun/KEY`, with which the next command goes on. It stays
for a month.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from io import BufferedRandom
from pathlib import Path

from edgemerge.errors import FormatError, OutputError
from edgemerge.remote.ranged import CHANGED, RangedFile
from edgemerge.sizes import format_size
from edgemerge.types import Progress

__all__ = ["keep_file"]

PIECE = 1 << 20
LEFT = 30 * 86_400  # seconds after which nobody is expected to go on with what was begun


def keep_file(
    remote: RangedFile,
    folder: Path,
    sha256: str | None,
    show_progress: Callable[[str], AbstractContextManager[Progress]],
) -> Path:
    """Return where a remote file is kept; fetch it where it is not, or not all of it.

    Parameters
    ----------
    remote : RangedFile
        The file.
    folder : Path
        Of all that is kept.
    sha256 : str, optional
        Of the file, where its server states it.
    show_progress : callable
        Called with what is fetched; gives a context whose value is told bytes done and bytes in all.

    Raises
    ------
    FormatError
        The server does not give it, what came is not what it states, or it changed meanwhile.
    OutputError
        It cannot be written.
    """
    key = hashlib.blake2b(repr((str(remote.address), *remote.identity)).encode(), digest_size=16)
    known = folder / "known" / f"{key.hexdigest()}.json"
    is_pinned = sha256 is not None or any(remote.identity[1:])
    n_bytes = remote.identity.n_bytes
    if is_pinned and (found := _find(folder, known, sha256, n_bytes)) is not None:
        return found
    begun = folder / "begun" / key.hexdigest()
    try:
        for inside in ("sha256", "known", "begun"):
            (folder / inside).mkdir(parents=True, exist_ok=True)
        with show_progress(str(remote.address)) as progress, _open_locked(begun) as file:
            if is_pinned and (found := _find(folder, known, sha256, n_bytes)) is not None:
                begun.unlink()  # another command has just fetched it
                return found
            if not is_pinned:  # what is there may be of another file
                file.truncate(0)
            _remove_left(begun)
            _check_room(folder, n_bytes - os.fstat(file.fileno()).st_size)
            try:
                digest = _fetch(remote, file.fileno(), progress)
                if sha256 is None and is_pinned:
                    _check_unchanged(remote)
            except FormatError as error:
                if str(error).endswith(CHANGED):
                    begun.unlink()
                raise
            if sha256 is not None and digest != sha256:
                begun.unlink()
                raise FormatError(
                    "arrived damaged; give the same command again", path=str(remote.address)
                )
            begun.rename(folder / "sha256" / digest)
            _write(known, {"address": str(remote.address), "sha256": digest})
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some of this disk" if is_full else "give a folder that can be written"
        raise OutputError(
            f"cannot keep {remote.address} ({error.strerror}); {remedy}, or leave out --keep-remote",
            path=folder,
        ) from None
    return folder / "sha256" / digest


@contextmanager
def _open_locked(begun: Path) -> Iterator[BufferedRandom]:
    """Open what is fetched so far, for this command alone; others that want the same file wait."""
    while True:
        with begun.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_still(begun, file):  # else who had it has given it another name, or none
                yield file
                return


def _is_still(path: Path, file: BufferedRandom) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _find(folder: Path, known: Path, sha256: str | None, n_bytes: int) -> Path | None:
    """Look for a file by its hash, else by the address that it had."""
    try:
        found = folder / "sha256" / (sha256 or str(json.loads(known.read_bytes())["sha256"]))
        return found.absolute() if found.stat().st_size == n_bytes else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _remove_left(begun: Path) -> None:
    """Remove what was begun long ago, as of files that have changed since."""
    for path in begun.parent.iterdir():
        with suppress(OSError):  # also where another command has just gone on with it
            if path != begun and time.time() - path.stat().st_mtime > LEFT:
                with path.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        what = f"it needs {format_size(needed)}, and {format_size(free)} are free"
        raise OSError(errno.ENOSPC, what)


def _check_unchanged(remote: RangedFile) -> None:
    """Refuse a file that was changed while one answer brought all of it: only another answer shows that."""
    remote.fill([memoryview(bytearray(1))], 0, (0, 0))
    remote.check_unchanged()


def _fetch(remote: RangedFile, fd: int, progress: Progress) -> str:
    """Append to a file what it lacks of the remote one, and return the SHA-256 of the whole."""
    n_bytes, digest, at = remote.identity.n_bytes, hashlib.sha256(), 0
    if os.fstat(fd).st_size > n_bytes:
        os.ftruncate(fd, 0)
    while earlier := os.pread(fd, PIECE, at):
        digest.update(earlier)
        at += len(earlier)
    buffer = memoryview(bytearray(min(PIECE, n_bytes)))
    while at < n_bytes:
        piece = buffer[: n_bytes - at]
        remote.fill([piece], at, (at, n_bytes))
        digest.update(piece)
        _append(fd, piece)
        at += len(piece)
        progress(at, n_bytes)
    os.fsync(fd)
    return digest.hexdigest()


def _append(fd: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(fd, piece) :]


def _write(path: Path, document: dict[str, str]) -> None:
    new = path.with_suffix(f".{os.getpid()}")
    new.write_text(json.dumps(document), encoding="utf-8")
    new.rename(path)
