"""The hashes that `make arm64` compares on an emulated Arm are this machine's too."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support import portable_hashes
from tests.twins.codecs import hard_rows

STORED = portable_hashes.load()


def test_every_codec_and_method_has_a_hash() -> None:
    assert STORED.keys() == {"rows", *portable_hashes.CASES}


def test_the_rows_that_are_encoded_are_the_same() -> None:
    assert portable_hashes.sha256(hard_rows(portable_hashes.N_COLS)) == STORED["rows"]


@pytest.mark.parametrize("case", sorted(portable_hashes.CASES))
def test_bytes_are_those_of_every_processor(case: str) -> None:
    assert portable_hashes.compute(case) == STORED[case]


def test_any_nan_hashes_like_any_other() -> None:
    halves = np.array([0x7E00, 0xFE01, 0x7C01, 0x3C00], np.uint16)
    values = portable_hashes.decode("F16", halves.view(np.uint8)).view(np.uint32)
    assert values.tolist() == [0x7FC00000] * 3 + [0x3F800000]
