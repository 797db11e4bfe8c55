"""Rows of a cluster's worker that wait in a file until the client takes them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from edgemerge.errors import OutputError
from edgemerge.merging.kit import Parcel
from edgemerge.merging.tasks import Task
from edgemerge.types import TensorSpec

ROWS = np.arange(1, 33, dtype=np.uint8)


@pytest.fixture
def parcel(tmp_path: Path) -> Iterator[Parcel]:
    """Rows 2 to 6 of a tensor, of 8 bytes each, in a file."""
    spec = TensorSpec("x", (9, 2), "F32", 72)
    with closing(Parcel(spec, Task(0, 2, 6), 0, str(tmp_path))) as found:
        assert found.raw is None
        yield found


def test_a_disk_that_takes_rows_in_pieces_gets_all(
    parcel: Parcel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: what one write did not take was zeros."""
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: write(fd, data[:5], offset))
    parcel.write_rows(2, ROWS)
    assert np.array_equal(parcel.read(2, 6), ROWS)


def test_a_full_disk_is_named(
    parcel: Parcel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_given: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(OutputError) as caught:
        parcel.write_rows(2, ROWS)
    assert str(caught.value) == (
        f"{tmp_path}: the disk cannot keep rows until they are sent (No space left on device); free some "
        "space there"
    )
