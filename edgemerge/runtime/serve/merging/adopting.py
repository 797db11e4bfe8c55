"""The model that was served before the first promotion becomes a model of the folder, to go back to."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path

from edgemerge.formats.gguf.model import parts_of
from edgemerge.formats.inspection import read_provenance
from edgemerge.runtime.model_files import open_gguf
from edgemerge.runtime.serve.merging.child import digest_files
from edgemerge.site.folder import SiteFolder
from edgemerge.site.record import ID_DIGITS, ModelRecord

__all__ = ["adopt_start"]


async def adopt_start(
    site: SiteFolder, start: Path, make_folder: Callable[[], AbstractContextManager[Path]]
) -> None:
    """Take a file as the first model of a folder, and promote it; a split one is left where it is.

    On one disk the file gets a second name, else it is copied.

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
        It cannot be read, or the disk refused.
    """
    start = start.resolve()
    if len(parts_of(start)) > 1:
        return
    (digest,) = await digest_files([start])
    record = await asyncio.to_thread(_describe, start, digest)
    with make_folder() as folder:
        file = folder / start.name
        await asyncio.to_thread(_link_or_copy, start, file)
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


def _link_or_copy(path: Path, to: Path) -> None:
    try:
        os.link(path, to)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        shutil.copyfile(path, to)
        with to.open("rb") as file:
            os.fsync(file.fileno())
