"""Kernels that rotate values, against products in float64."""

from __future__ import annotations

import numpy as np
import pytest

from edgemerge.native import KernelFile

permute = KernelFile("permute")


def matrices(n: int, length: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    rng = np.random.default_rng(n)
    found = [np.linalg.qr(rng.standard_normal((length, length)))[0] for _ in range(n)]
    return np.array(found, np.float32)


@pytest.mark.parametrize(("per_rotation", "first"), [(1, 0), (3, 0), (1, 5), (2, 7)])
def test_columns(per_rotation: int, first: int) -> None:
    rng = np.random.default_rng(1)
    turns, length = matrices(3, 4), 4
    n_cols = first + 3 * per_rotation * length + 2  # two more stand behind the parts
    x = rng.standard_normal((6, n_cols)).astype(np.float32)
    out, row = x.copy().reshape(-1), np.full(n_cols, np.nan, np.float32)
    permute.rotate_columns(turns, per_rotation, first, row, out)
    wanted = x.astype(np.float64)
    for part in range(3 * per_rotation):
        at = slice(first + part * length, first + (part + 1) * length)
        wanted[:, at] = x[:, at].astype(np.float64) @ turns[part // per_rotation].T
    np.testing.assert_array_equal(out.reshape(x.shape), wanted.astype(np.float32))


@pytest.mark.parametrize("step", [1, 3, 8])
def test_rows_do_not_depend_on_blocks(step: int) -> None:
    rng = np.random.default_rng(2)
    turn, length = matrices(1, 8)[0], 8
    x = rng.standard_normal((length, 11)).astype(np.float32)
    whole = np.zeros((length, 11), np.float32)
    permute.add_rotated_rows(turn, 0, 0, x, whole)
    np.testing.assert_allclose(whole, turn.astype(np.float64) @ x, atol=1e-5)
    out = np.zeros((3, 11), np.float32)  # rows 2 to 4, the old rows in pieces
    for at in range(0, length, step):
        permute.add_rotated_rows(turn, 2, at, x[at : at + step].copy(), out)
    assert np.array_equal(out, whole[2:5])
