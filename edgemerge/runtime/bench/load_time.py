"""How long a model takes to load: from the disk, and from the page cache."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgemerge.formats.files import cached_share
from edgemerge.runtime.library import load_library
from edgemerge.runtime.llama import Model

__all__ = ["LoadTime", "drop_cache", "load_timed"]

_LEFT = 0.01  # share of a file that may stay in the cache and the load still count as cold


@dataclass(frozen=True, slots=True)
class LoadTime:
    """Seconds until a model has answered to one token, in a fresh process.

    Attributes
    ----------
    warm : float
        With the file in the page cache.
    cold : float or None
        Without; None where the cache could not be dropped.
    note : str
        Why there is no cold time; empty where there is.
    """

    warm: float
    cold: float | None
    note: str


def load_timed(
    path: Path,
    *,
    n_threads: int | None = None,
    n_gpu_layers: int | None = None,
    rpc: Sequence[str] = (),
) -> tuple[Model, float]:
    """Load a model and run one token, so that weights which are read only when used count too.

    Returns
    -------
    (Model, float)
        The model, and the seconds that this took; importing llama.cpp is not among them.

    Raises
    ------
    RuntimeFailure
        llama.cpp refuses the file.
    """
    load_library()
    start = time.perf_counter()
    model = Model(path, n_threads=n_threads, n_gpu_layers=n_gpu_layers, rpc=rpc)
    try:
        with model.context(8, n_batch=8) as context:
            context.decode(model.bos or [0], [True])
    except BaseException:
        model.close()
        raise
    return model, time.perf_counter() - start


def drop_cache(paths: Sequence[Path]) -> str:
    """Ask the kernel to forget files that it keeps in memory.

    Returns
    -------
    str
        Empty where it did; else why a read of them would not be cold.

    Raises
    ------
    OSError
        A file cannot be read.
    """
    kept = 0.0
    for path in paths:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)  # what is not on the disk yet cannot be dropped
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            kept = max(kept, cached_share(fd))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        finally:
            os.close(fd)
    if kept <= _LEFT:
        return ""
    return (
        f"the kernel keeps {100 * kept:.0f} % of the file in memory: "
        "it lies on a disk in memory, belongs to another user, or another program has it open"
    )
