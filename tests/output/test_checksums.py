"""Checksums of pieces are those of the whole."""

from __future__ import annotations

import zlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemerge.output.checksums import RowChecksum, join_checksums


@given(st.data(), st.integers(0, 40), st.integers(1, 700))
def test_pieces_in_any_order(data: st.DataObject, n_rows: int, row_bytes: int) -> None:
    raw = np.random.default_rng(n_rows).integers(0, 256, n_rows * row_bytes, np.uint8)
    cuts = sorted({0, n_rows, *data.draw(st.lists(st.integers(0, n_rows), max_size=6))})
    pieces = data.draw(st.permutations(list(pairwise(cuts))))
    workers = [RowChecksum() for _ in range(3)]
    for start, stop in pieces:
        worker = data.draw(st.sampled_from(workers))
        worker.add(start, stop - start, raw[start * row_bytes : stop * row_bytes])
    assert join_checksums(workers) == zlib.crc32(raw.data)


def test_rows_that_follow_each_other_are_one_run() -> None:
    checksum = RowChecksum()
    for start in range(5):
        checksum.add(start, 1, np.full(7, start, np.uint8))
    assert len(checksum.runs) == 1


@pytest.mark.parametrize("n", [0, 1, 4095, 32767, 99_999])
def test_a_checksum_is_zlibs(n: int) -> None:
    raw = np.random.default_rng(n).integers(0, 256, n + 3, np.uint8)[3:]  # not aligned
    checksum = RowChecksum()
    checksum.add(0, 1, raw)
    assert join_checksums([checksum]) == zlib.crc32(raw.data)
