"""How long a merge will take, from how long those before took on this device."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from edgemerge.runtime.serve.merging.choices import Wanted
from edgemerge.site.folder import SiteFolder

__all__ = ["estimate_seconds"]

_LATEST = 5  # merges that count
_PROBE_BYTES = 32 << 20
_CHUNK = 1 << 20


def estimate_seconds(site: SiteFolder, wanted: Wanted, read_bytes: int) -> dict[str, Any]:
    """Estimate the time of a merge.

    Records have the bytes that a merge read, and its seconds. Merges by the same method count, else all.
    Where none was made here, the disk gives what the merge takes at least.

    Parameters
    ----------
    site : SiteFolder
        The folder with the records.
    wanted : Wanted
        The merge.
    read_bytes : int
        What its plan reads, over all passes.

    Returns
    -------
    dict
        `seconds`, and `basis`: method, merges or disk.
    """
    known = [(one.method, rate) for one in site.records() if (rate := _rate(one.settings))]
    same = [rate for method, rate in known if method == wanted.method.name]
    if rates := same or [rate for _, rate in known]:
        seconds = read_bytes / median(rates[:_LATEST])
        return {"seconds": seconds, "basis": "method" if same else "merges"}
    paths = [offer.path for offer, _ in wanted.models]
    return {"seconds": read_bytes / _disk_rate(paths), "basis": "disk"}


def _rate(settings: Any) -> float | None:
    n_bytes, seconds = settings.get("read_bytes"), settings.get("seconds")
    if isinstance(n_bytes, int) and isinstance(seconds, int | float) and seconds > 0:
        return n_bytes / seconds if n_bytes else None
    return None


def _disk_rate(paths: Sequence[Path]) -> float:
    """Bytes per second at which the files can be read, from their beginnings."""
    done, started = 0, time.perf_counter()
    buffer = bytearray(_CHUNK)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, _PROBE_BYTES, os.POSIX_FADV_DONTNEED)
            left = _PROBE_BYTES
            while left > 0 and (n_read := file.readinto(buffer)):
                done, left = done + n_read, left - n_read
    return max(1, done) / max(1e-6, time.perf_counter() - started)
