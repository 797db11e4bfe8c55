"""Loads only models that a key signed: `edgemerge serve --require-signature`.

What holds: every byte of a model and of its adapters is hashed before llama.cpp opens the files, each time
that they are loaded. After it has opened them, the names must still stand for the same inodes with the same
times. So a file that was replaced or written to is not served.

What does not hold: llama.cpp opens files by name and maps them. Who can write to them, or rename their
folders, at the right moment, can still change what is computed. Keep the files where only another account can
write: then there is no such moment.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

from edgemerge.provenance.keys import read_public_key
from edgemerge.provenance.signature import check_signature
from edgemerge.runtime.serve.loaded import Loaded
from edgemerge.runtime.serve.models import ModelFile

__all__ = ["SignedLoader"]


class SignedLoader:
    """Loads models whose signature is good; takes the place of a store's `start`.

    Parameters
    ----------
    load : function
        Starts a process with a model.
    key : Path
        Public key.
    loras : iterable of Path
        Adapters that `load` adds to every model.

    Raises
    ------
    FormatError
        The key is none.
    RuntimeFailure
        `cryptography` is not installed.
    """

    def __init__(
        self,
        load: Callable[[ModelFile], Awaitable[Loaded]],
        key: Path,
        loras: Iterable[Path],
    ) -> None:
        self._load = load
        self._key = read_public_key(key)
        self._loras = tuple(loras)

    def check(self, path: Path) -> None:
        """See that a file, which will be loaded later, is signed.

        Raises
        ------
        VerificationError, FormatError
            As of `check_signature`.
        """
        check_signature(path, self._key)

    async def __call__(self, file: ModelFile) -> Loaded:
        """Load a model.

        Raises
        ------
        VerificationError, FormatError
            As of `check_signature`, or it changed while it was loaded.
        """
        paths = (file.path, *self._loras)
        # in a thread, for it reads all bytes
        signed = await asyncio.to_thread(lambda: [check_signature(p, self._key) for p in paths])
        loaded = await self._load(file)
        try:
            for one in signed:
                one.check_unchanged()
        except BaseException:
            await loaded.process.close()
            raise
        return loaded
