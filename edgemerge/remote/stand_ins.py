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
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

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
_made: list[Path] = []  # folders that `StandIns.take` made
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
    names : mapping of str to str
        What paths are called.
    """

    roots: tuple[Path, ...]
    remote: Mapping[Path, tuple[type[RangedFile], AnyAddress, Identity]]
    small: Mapping[Path, bytes]
    names: Mapping[str, str]

    def take(self) -> None:
        """Let the same paths stand for the same files here. Files that are there already stay."""
        for path, (reader, address, identity) in self.remote.items():
            if path not in _files:
                _files[path] = reader.reopen(address, identity)
            _write(path, b"", identity.n_bytes)
        for path, raw in self.small.items():
            _write(path, raw, len(raw))
        for known, name in self.names.items():
            call_path(known, name)

    def drop(self) -> None:
        """End the connections. What was made on the disk stays until the process ends."""
        for path in self.remote:
            if (remote := _files.pop(path, None)) is not None:
                remote.close()


def list_stand_ins() -> StandIns:
    """Return what stands for the remote models of this process."""
    roots = tuple(_folders)
    return StandIns(
        roots,
        {path: (type(remote), remote.address, remote.identity) for path, remote in _files.items()},
        {
            path: path.read_bytes()
            for root in roots
            for path in root.rglob("*")
            if path.is_file() and not path.is_symlink() and path not in _files
        },
        names_of_paths() if roots else {},
    )


def _write(path: Path, raw: bytes, n_bytes: int) -> None:
    """Make a file at once, unless it is there: other processes may make the same."""
    if path.exists():
        return
    import tempfile

    if not any(path.is_relative_to(root) for root in _made):
        root = next(parent for parent in reversed(path.parents) if not parent.exists())
        _made.append(root)
        atexit.register(shutil.rmtree, root, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, made = tempfile.mkstemp(dir=path.parent)
    with open(fd, "wb") as file:
        file.write(raw)
        file.truncate(n_bytes)
    os.replace(made, path)


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
