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
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from edgemerge.shown_paths import call_path, forget_paths

if TYPE_CHECKING:  # a merge of files here does without what talks to servers
    from edgemerge.remote.ranged import RangedFile

__all__ = [
    "add_file",
    "find_remote",
    "is_address",
    "is_remote",
    "new_folder",
    "remove_all",
    "stop_reading",
]

_files: dict[Path, RangedFile] = {}
_folders: list[Path] = []
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
