"""The model that was served before the first promotion becomes a model of the folder, to go back to."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path

from edgemerge.errors import OutputError
from edgemerge.formats.files import check_unchanged, read_state
from edgemerge.formats.gguf.model import parts_of
from edgemerge.formats.inspection import read_provenance
from edgemerge.output.file import OutputFile, read_chunks
from edgemerge.runtime.model_files import open_gguf
from edgemerge.runtime.serve.merging.child import digest_files
from edgemerge.site.folder import SiteFolder
from edgemerge.site.record import ID_DIGITS, ModelRecord

__all__ = ["adopt_start"]


async def adopt_start(
    site: SiteFolder, start: Path, make_folder: Callable[[], AbstractContextManager[Path]]
) -> None:
    """Promote a copy of a file as the first model of a folder; a split one is left where it is.

    A hard link would not do: who writes over the file would change the model of the folder with it.

    Parameters
    ----------
    site : SiteFolder
        The folder, locked, without a current model.
    start : Path
        The file.
    make_folder : function
        Makes a folder in the site's `work`.

    Raises
    ------
    EdgemergeError
        It cannot be read, or the disk refused or has no room for a copy.
    """
    start = start.resolve()
    if len(parts_of(start)) > 1:
        return
    with make_folder() as folder:
        file = folder / start.name
        try:
            await asyncio.to_thread(_copy, start, file)
        except OutputError as error:
            raise OutputError(
                f"cannot be copied, which a later roll back needs ({error})", path=start.name
            ) from error
        (digest,) = await digest_files([file])
        record = await asyncio.to_thread(_describe, file, digest)
        await asyncio.to_thread(site.add, file, record)
    site.promote(record.id, "it served before the first merge of the page")


def _describe(path: Path, digest: str) -> ModelRecord:
    source = open_gguf(path)
    try:
        provenance = read_provenance(source.metadata())
    finally:
        source.close()
    facts = path.stat()
    made = datetime.fromtimestamp(facts.st_mtime, UTC)
    number = digest[:ID_DIGITS]
    return ModelRecord(
        id=number,
        file=f"models/{number}.gguf",
        sha256=digest,
        bytes=facts.st_size,
        made=made.strftime("%Y-%m-%dT%H:%M:%SZ"),
        made_of=(),
        method="given" if provenance is None else provenance.method,
        settings={"name": path.stem},
    )


def _copy(path: Path, to: Path) -> None:
    """Copy a file and its time, durably."""
    with path.open("rb", buffering=0) as source:
        state = read_state(source.fileno(), path)
        with OutputFile(to, state.n_bytes) as out:
            offset = 0
            for chunk in read_chunks(source.fileno(), 0, state.n_bytes):
                out.write(chunk, offset)
                offset += len(chunk)
            check_unchanged(source.fileno(), state)
            out.publish()
    os.utime(to, ns=(state.mtime_ns, state.mtime_ns))
