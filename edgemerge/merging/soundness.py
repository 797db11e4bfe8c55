"""NaN and infinity in inputs, found before long work that they would spoil."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgemerge.errors import FormatError, MismatchError
from edgemerge.formats.quants.finite import find_non_finite
from edgemerge.types import Progress, Source, TensorJob

__all__ = ["check_finite", "say_damaged", "say_undefined"]

PIECE = 1 << 20  # bytes that are read at once; one row at least


def check_finite(tensors: Sequence[tuple[Source, str]], progress: Progress) -> None:
    """Read tensors, and refuse NaN and infinity in them as a merge does.

    Parameters
    ----------
    tensors : sequence of (Source, str)
        Open models, and names of tensors in them.
    progress : callable
        Called with bytes read and bytes in all; may raise to stop.

    Raises
    ------
    FormatError
        A tensor holds NaN or infinity.
    """
    done, total = 0, sum(source.specs()[name].nbytes for source, name in tensors)
    for source, name in tensors:
        spec = source.specs()[name]
        step = max(1, PIECE // spec.row_bytes)
        for start in range(0, spec.n_rows, step):
            stop = min(start + step, spec.n_rows)
            raw = np.empty((stop - start) * spec.row_bytes, np.uint8)
            source.read_rows(name, start, stop, raw)
            bad = find_non_finite(raw, spec.dtype)
            if bad is not None:
                index = start * spec.n_cols + bad
                raise say_damaged(source.path, name, "NaN or infinity", index)
            done += raw.nbytes
            progress(done, total)
        source.forget(name)


def say_damaged(path: Path, name: str, what: str, index: int) -> FormatError:
    """Make the error for a number of a tensor that is none, at an index of its elements."""
    return FormatError(
        f"holds {what} at index {index}; that model is damaged, get it again",
        path=path,
        tensor=name,
    )


def say_undefined(job: TensorJob) -> MismatchError:
    """Make the error for a result of finite inputs that is NaN."""
    settings = [f"{name}: {str(value).lower()}" for name, value in job.settings.items()]
    given = f" with {', '.join(settings)}" if settings else ""
    return MismatchError(
        f"{job.method} has no result for the tensor {job.out.name!r}{given}: some of it is NaN; use other "
        "settings or weights, or another method",
        tensor=job.out.name,
    )
