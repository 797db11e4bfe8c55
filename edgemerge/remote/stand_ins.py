"""What stands for remote models on this machine, so that all who look at paths see files and folders.

A file of tensors is stood for by an empty one of the same size, all holes, which is never read: whoever opens
a model asks `find_remote` first. Who does not finds zeros where a header should be, and refuses them. Small
files are fetched. All of it lies in one temporary folder, which ends with the process.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from edgemerge.errors import FormatError
from edgemerge.shown_paths import call_path, forget_paths, names_of_paths

if TYPE_CHECKING:  # a merge of files here does without what talks to servers
    from edgemerge.remote.any_address import AnyAddress
    from edgemerge.remote.ranged import Identity, RangedFile

__all__ = [
    "StandIns",
    "add_file",
    "find_remote",
    "is_address",
    "is_remote",
    "list_stand_ins",
    "new_folder",
    "remove_all",
    "stop_reading",
]

_files: dict[Path, RangedFile] = {}
_folders: list[Path] = []
_made: set[Path] = set()  # what `StandIns.take` made, and the folders that it is in
_numbers = count()
# A path's text has one slash less.
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://|(?:https?|hf|s3|sftp):/", re.ASCII | re.IGNORECASE)


def is_address(text: str) -> bool:
    """Tell whether a text begins as an address does, perhaps one that was taken for a path."""
    return _ADDRESS.match(text) is not None


def new_folder(inside: str) -> Path:
    """Make a folder for one model, below a new one so that its name is free.

    Parameters
    ----------
    inside : str
        The folder's path there, relative.
    """
    import tempfile

    if not _folders:
        _folders.append(Path(os.path.realpath(tempfile.mkdtemp(prefix="edgemerge-"))))
        atexit.register(remove_all)
    folder = _folders[0] / str(next(_numbers)) / inside
    folder.mkdir(parents=True)
    return folder


def add_file(path: Path, remote: RangedFile) -> None:
    """Let a path, where nothing is yet, stand for a remote file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.truncate(remote.identity.n_bytes)
    _files[path] = remote
    call_path(path, str(remote.address))


def find_remote(path: str | os.PathLike[str]) -> RangedFile | None:
    """Return the remote file that a path stands for; None for any other path."""
    return _files.get(Path(path)) if _files else None


def is_remote(path: Path) -> bool:
    """Tell whether a model is read from another machine, or something that is added to it is."""
    text = str(path)
    return any(str(file) in text or str(file.parent) in text for file in _files)


@dataclass(frozen=True)
class StandIns:
    """What stands for the remote models of one process, to stand for them in another too.

    The addresses have their logins, so that who can read this can read the files.

    Attributes
    ----------
    roots : tuple of Path
        Folders that all of it lies in.
    remote : mapping of Path to (class, AnyAddress, Identity)
        Files of tensors, and what reads them.
    small : mapping of Path to bytes
        Files that were fetched.
    links : mapping of Path to Path
        Files that are kept on this machine, and where.
    names : mapping of str to str
        What paths are called.
    """

    roots: tuple[Path, ...]
    remote: Mapping[Path, tuple[type[RangedFile], AnyAddress, Identity]]
    small: Mapping[Path, bytes]
    links: Mapping[Path, Path]
    names: Mapping[str, str]

    def take(self) -> None:
        """Let the same paths stand for the same files here. Files that are there already stay.

        Raises
        ------
        FormatError
            A file that is kept is not seen here.
        """
        for path, target in self.links.items():
            self._link(path, target)
        for path, (reader, address, identity) in self.remote.items():
            if path not in _files:
                _files[path] = reader.reopen(address, identity)
            self._write(path, b"", identity.n_bytes)
        for path, raw in self.small.items():
            self._write(path, raw, len(raw))
        for known, name in self.names.items():
            call_path(known, name)

    def drop(self) -> None:
        """End the connections. What was made on the disk stays until the process ends."""
        for path in self.remote:
            if (remote := _files.pop(path, None)) is not None:
                remote.close()

    def _write(self, path: Path, raw: bytes, n_bytes: int) -> None:
        """Make a file at once, unless it is there: other processes may make the same."""
        if path.exists():
            return
        import tempfile

        self._make_folder(path)
        fd, made = tempfile.mkstemp(dir=path.parent)
        try:
            with open(fd, "wb") as file:
                file.write(raw)
                file.truncate(n_bytes)
            os.replace(made, path)
        except OSError:
            os.unlink(made)
            raise
        _made.add(path)

    def _link(self, path: Path, target: Path) -> None:
        """Let a path lead to where a file is kept."""
        if not target.exists():
            raise FormatError(
                "is not there; keep models in a folder that all workers see under this path, or leave "
                "out --keep-remote",
                path=target,
            )
        if not path.is_symlink():
            self._make_folder(path)
            with suppress(FileExistsError):  # another process has just made it
                path.symlink_to(target)
                _made.add(path)

    def _make_folder(self, path: Path) -> None:
        """Make the folder of what is to be made, and have all of it removed when the process ends."""
        if not _made:
            atexit.register(_remove_made)
        for folder in path.parents:
            if not folder.exists() or any(folder.is_relative_to(root) for root in self.roots):
                _made.add(folder)
        path.parent.mkdir(parents=True, exist_ok=True)


def list_stand_ins() -> StandIns:
    """Return what stands for the remote models of this process."""
    roots = tuple(_folders)
    there = [path for root in roots for path in root.rglob("*")]
    return StandIns(
        roots,
        {path: (type(remote), remote.address, remote.identity) for path, remote in _files.items()},
        {
            path: path.read_bytes()
            for path in there
            if path.is_file() and not path.is_symlink() and path not in _files
        },
        {path: path.readlink() for path in there if path.is_symlink()},
        names_of_paths() if roots else {},
    )


def _remove_made() -> None:
    """Remove what this process made, and folders unless something of another process is in them."""
    for path in sorted(_made, key=lambda path: len(path.parts), reverse=True):
        with suppress(OSError):
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink()
    _made.clear()


def stop_reading(paths: Iterable[Path]) -> None:
    """Make who reads from these files raise `Stopped`, and who waits for their servers wake up."""
    for path in paths:
        if (remote := find_remote(path)) is not None:
            remote.stop()


def remove_all() -> None:
    """Close all connections and remove what stands for the files."""
    for remote in _files.values():
        remote.close()
    _files.clear()
    forget_paths()
    while _folders:
        shutil.rmtree(_folders.pop(), ignore_errors=True)
    atexit.unregister(remove_all)
