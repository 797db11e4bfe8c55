"""Loads models and notes which bytes they are, for the log of requests.

A file may be replaced while its model answers. So the digest is made when the model is loaded, and stays
with it.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from threading import Event

from edgemerge.errors import RuntimeFailure
from edgemerge.formats.gguf.model import parts_of
from edgemerge.runtime.serve.loaded import Loaded
from edgemerge.runtime.serve.models import ModelFile, Stamps, read_stamps

__all__ = ["HashedLoader"]

_CHUNK = 1 << 20


class HashedLoader:
    """Loads models with their SHA-256; takes the place of a store's `start`.

    Parameters
    ----------
    load : function
        Starts a process with a model.
    """

    def __init__(self, load: Callable[[ModelFile], Awaitable[Loaded]]) -> None:
        self._load = load
        self._digests: dict[Stamps, str] = {}  # hashing a large file takes as long as loading it

    async def __call__(self, file: ModelFile) -> Loaded:
        """Load a model.

        Raises
        ------
        RuntimeFailure
            Its file cannot be read, or changed while it was loaded.
        """
        stamps = read_stamps(file.path)
        digest = self._digests.get(stamps) or await _hash(file.path)
        loaded = await self._load(file)
        try:
            if read_stamps(file.path) != stamps:
                raise RuntimeFailure(
                    f"{file.path}: changed while it was loaded; see who writes there, and load it again"
                )
        except BaseException:
            await loaded.process.close()
            raise
        loaded.sha256 = self._digests[stamps] = digest
        return loaded


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
