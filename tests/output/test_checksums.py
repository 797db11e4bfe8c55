"""Checksums of pieces are those of the whole."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgemerge.output import checksums
from edgemerge.output.checksums import LEAST_FOLDED, RowChecksum, join_checksums


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


@pytest.mark.parametrize("can_fold", [True, False])
@pytest.mark.parametrize(
    "n", [0, 1, 4095, LEAST_FOLDED - 1, LEAST_FOLDED, LEAST_FOLDED + 257, 99_999]
)
def test_crc32_is_zlibs(n: int, can_fold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = np.random.default_rng(n).integers(0, 256, n + 3, np.uint8)[3:]  # not aligned
    monkeypatch.setattr(checksums._Folding, "is_possible", can_fold)
    for value in (0, 1, 0xDEADBEEF, 0xFFFFFFFF):
        assert checksums.crc32(raw, value) == zlib.crc32(raw.tobytes(), value)


def test_a_processor_that_cannot_fold_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Unable:
        @staticmethod
        def fold_crc32(*arguments: NDArray[np.uint8]) -> None:
            asked.append(arguments)
            arguments[-1][0] = 0

    monkeypatch.setattr(checksums, "kernels", Unable)
    monkeypatch.setattr(checksums._Folding, "is_possible", True)
    raw = np.zeros(LEAST_FOLDED, np.uint8)
    assert [checksums.crc32(raw) for _ in range(3)] == [zlib.crc32(raw.data)] * 3
    assert len(asked) == 1


def test_factors_are_those_that_were_published() -> None:
    """For 512 and 128 bits, in Intel's paper of 2009; ours are for 2048."""
    powers = [checksums._power_of_x(n) << 1 for n in (544, 480, 160, 96)]
    assert powers == [0x154442BD4, 0x1C6E41596, 0x1751997D0, 0x0CCAA009E]


WIDTHS = {  # sums an instruction -> what the processor needs, in LLVM's words and in Linux's
    1: ("+pclmul", {"pclmulqdq"}),
    2: ("+pclmul,+vpclmulqdq", {"avx2", "vpclmulqdq"}),
    4: ("+pclmul,+vpclmulqdq,+avx512f", {"avx512f", "vpclmulqdq"}),
}


@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_folds_to_the_same(width: int, tmp_path: Path) -> None:
    """A wheel folds 128 bits at a time, what is compiled here as many as there are."""
    features, flags = WIDTHS[width]
    info = Path("/proc/cpuinfo")
    if not info.exists() or not flags <= set(info.read_text().split()):
        pytest.skip("this processor does not multiply so")
    code = (
        "import zlib, numpy as np\n"
        "from edgemerge.output import checksums\n"
        "raw = np.random.default_rng(0).integers(0, 256, 99_999, np.uint8)\n"
        "print(checksums.crc32(raw, 7) == zlib.crc32(raw, 7), checksums._Folding.is_possible)"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_CPU_NAME": "x86-64-v2"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "NUMBA_CPU_FEATURES": features},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.stdout, result.stderr) == ("True True\n", "")
