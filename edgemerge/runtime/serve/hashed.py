"""Loads models and notes which bytes they are, for the log of requests.

A file may be replaced while its model answers. So the digest is made when the model is loaded, and stays
with it.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from edgemerge.errors import RuntimeFailure
from edgemerge.formats.gguf.model import parts_of
from edgemerge.runtime.serve.models import ModelFile
from edgemerge.runtime.serve.store import Loaded

__all__ = ["HashedLoader"]

# Of each file device, inode, bytes, and when contents and inode last changed.
_States = tuple[tuple[int, ...], ...]


class HashedLoader:
    """Loads models with their SHA-256; takes the place of a store's `start`.

    Parameters
    ----------
    load : function
        Starts a process with a model.
    """

    def __init__(self, load: Callable[[ModelFile], Awaitable[Loaded]]) -> None:
        self._load = load
        self._digests: dict[_States, str] = {}  # hashing a large file takes as long as loading it

    async def __call__(self, file: ModelFile) -> Loaded:
        """Load a model.

        Raises
        ------
        RuntimeFailure
            Its file cannot be read, or changed while it was loaded.
        """
        states = _read_states(file.path)
        if states not in self._digests:
            self._digests[states] = await asyncio.to_thread(_hash, file.path)
        loaded = await self._load(file)
        try:
            if _read_states(file.path) != states:
                raise RuntimeFailure(
                    f"{file.path}: changed while it was loaded; see who writes there, and load it again"
                )
        except BaseException:
            await loaded.process.close()
            raise
        loaded.sha256 = self._digests[states]
        return loaded


def _read_states(path: Path) -> _States:
    try:
        found = [os.stat(part) for part in parts_of(path)]
    except OSError as error:
        raise _unreadable(path, error) from error
    return tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in found)


def _hash(path: Path) -> str:
    """Give the SHA-256 of a model's file, of a split one its files in order."""
    digest = hashlib.sha256()
    try:
        for part in parts_of(path):
            with part.open("rb") as file:
                hashlib.file_digest(file, lambda: digest)
    except OSError as error:
        raise _unreadable(path, error) from error
    return digest.hexdigest()


def _unreadable(path: Path, error: OSError) -> RuntimeFailure:
    return RuntimeFailure(f"{path}: cannot be read ({error.strerror}); check the path")
