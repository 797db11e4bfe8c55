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
from threading import Event

from edgemerge.errors import RuntimeFailure
from edgemerge.formats.gguf.model import parts_of
from edgemerge.runtime.serve.models import ModelFile
from edgemerge.runtime.serve.store import Loaded

__all__ = ["HashedLoader"]

_CHUNK = 1 << 20

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
        digest = self._digests.get(states) or await _hash(file.path)
        loaded = await self._load(file)
        try:
            if _read_states(file.path) != states:
                raise RuntimeFailure(
                    f"{file.path}: changed while it was loaded; see who writes there, and load it again"
                )
        except BaseException:
            await loaded.process.close()
            raise
        loaded.sha256 = self._digests[states] = digest
        return loaded


def _read_states(path: Path) -> _States:
    try:
        found = [os.stat(part) for part in parts_of(path)]
    except OSError as error:
        raise _unreadable(path, error) from error
    return tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in found)


async def _hash(path: Path) -> str:
    """Give the SHA-256 of a model's file, of a split one its files in order."""
    is_left = Event()  # a thread cannot be cancelled, and the end of the server would wait for it
    try:
        return await asyncio.to_thread(_hash_until, path, is_left)
    except OSError as error:
        raise _unreadable(path, error) from error
    finally:
        is_left.set()


def _hash_until(path: Path, is_left: Event) -> str:
    digest, view = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    for part in parts_of(path):
        with part.open("rb", buffering=0) as file:
            while not is_left.is_set() and (n_read := file.readinto(view)):
                digest.update(view[:n_read])
    return digest.hexdigest()


def _unreadable(path: Path, error: OSError) -> RuntimeFailure:
    return RuntimeFailure(f"{path}: cannot be read ({error.strerror}); check the path")
