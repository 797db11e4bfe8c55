"""Encodes by an importance matrix: ggml's bytes where the errors of columns are weighted.

`quantize_row_*_impl` of ggml-quants.c do three steps, and so does this. Sub-blocks are gathered with their
weights. A search finds their scales (and minima). The rounded scales decide the quants. Each step is a kernel
of its own, since most types have their steps in common. A step works on 64 sub-blocks, so calls cost nothing
to speak of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgemerge.native import load_kernel
from edgemerge.types import Float32, UInt8

__all__ = ["WEIGHTED_SCRATCH", "WEIGHTED_TYPES", "encode_weighted", "weighted_kernels"]

LANES = 64
FIT_ROWS = 16
WEIGHTED_SCRATCH = (3 * 32 + FIT_ROWS) * LANES + 256
"""float32 elements that `encode_weighted` needs."""


@dataclass(frozen=True, slots=True)
class _Row:
    """How ggml weighs and searches one type."""

    sub_len: int  # values of one sub-block
    top: int  # of the quants; 0: IQ4's levels
    group_len: int | None  # values that sigma2 is taken of; None: a row; 0: weights are importances
    before: float  # sigma2 = before * sum of squares / after
    after: int | None  # None: the length of a row
    block_bytes: int
    subs: int  # sub-blocks of one block


_ROWS = {
    "Q2_K": _Row(16, 3, 256, 1.0, 256, 84, 16),
    "Q3_K": _Row(16, 4, 256, 2.0, 256, 110, 16),
    "Q4_K": _Row(32, 15, 256, 2.0, 256, 144, 8),
    "Q5_K": _Row(32, 31, 256, 2.0, 256, 176, 8),
    "Q6_K": _Row(16, 32, 0, 0.0, 1, 210, 16),
    "IQ4_NL": _Row(32, 0, 32, 2.0 / 32, 1, 18, 1),
    "IQ4_XS": _Row(32, 0, 256, 2.0 / 256, 1, 136, 8),
    "Q4_0": _Row(32, 8, None, 1.0, None, 18, 1),
    "Q4_1": _Row(32, 15, None, 1.0, None, 20, 1),
    "Q5_0": _Row(32, 16, None, 1.0, None, 22, 1),
    "Q5_1": _Row(32, 31, None, 1.0, None, 24, 1),
}
WEIGHTED_TYPES = frozenset(_ROWS)
"""ggml types whose encoders an importance matrix guides; the others take no notice of it."""


def encode_weighted(
    dtype: str, x_f32: Float32, importance_f32: Float32, out_u8: UInt8, scratch_f32: Float32
) -> None:
    """Write the blocks that ggml's quantiser makes of whole rows with an importance matrix.

    Parameters
    ----------
    dtype : str
        One of `WEIGHTED_TYPES`.
    x_f32 : (n_rows * n_cols,) float32
        finite values
    importance_f32 : (n_cols,) float32
        of the columns; finite and not negative
    out_u8 : (n_blocks * block_bytes,) uint8
        written
    scratch_f32 : (>= WEIGHTED_SCRATCH,) float32
        overwritten with nothing of use
    """
    row = _ROWS[dtype]
    n_cols = importance_f32.size
    assert x_f32.size % n_cols == 0, "only whole rows can be weighted"
    work = _Work(row, scratch_f32)
    group_len = n_cols if row.group_len is None else row.group_len
    before = np.float32(row.before)
    after = np.float32(n_cols if row.after is None else row.after)
    n_sub = x_f32.size // row.sub_len
    for first in range(0, n_sub, LANES):
        last = min(first + LANES, n_sub)
        load_kernel("importance", "gather_weighted")(
            x_f32, importance_f32, first, group_len, before, after, work.tile, work.weights
        )
        x = x_f32[row.sub_len * first : row.sub_len * last]
        out = out_u8[row.block_bytes * first // row.subs : row.block_bytes * last // row.subs]
        _WRITERS[dtype](row, work, x, out)


class _Work:
    """The parts of the scratch."""

    def __init__(self, row: _Row, scratch_f32: Float32) -> None:
        n = row.sub_len * LANES
        self.tile = scratch_f32[:n]
        self.weights = scratch_f32[n : 2 * n]
        self.quants = scratch_f32[2 * n : 3 * n]
        self.fit = scratch_f32[3 * n : 3 * n + FIT_ROWS * LANES]
        self.levels = scratch_f32[3 * n + FIT_ROWS * LANES :]

    def fit_row(self, row: int, n: int) -> Float32:
        """Return what a search found of the first `n` sub-blocks."""
        return self.fit[row * LANES : row * LANES + n]


def _search_symmetric(row: _Row, work: _Work) -> None:
    load_kernel("weighted_symmetric", "search_symmetric")(
        work.tile, work.weights, row.top, work.fit, work.quants
    )


def _search_affine(row: _Row, work: _Work) -> None:
    load_kernel("weighted_affine", "search_affine")(
        work.tile, work.weights, row.top, work.fit, work.quants
    )


def _write_q2_k(row: _Row, work: _Work, x: Float32, out: UInt8) -> None:
    _search_affine(row, work)
    load_kernel("weighted_scales", "write_scales_q2_k")(
        work.fit, work.levels, out.reshape(-1, row.block_bytes)
    )
    inverses, minima = _left_quants(row, work, out)
    load_kernel("q2_k", "write_quants_q2_k")(x, inverses, minima, work.levels, out)


def _write_q4_k(row: _Row, work: _Work, x: Float32, out: UInt8) -> None:
    _search_affine(row, work)
    load_kernel("weighted_scales", "write_scales_q4_k")(
        work.fit, 255, work.levels, out.reshape(-1, row.block_bytes)
    )
    load_kernel("q4_k", "write_quants_q4_k")(x, *_left_quants(row, work, out), out)


def _write_q5_k(row: _Row, work: _Work, x: Float32, out: UInt8) -> None:
    _search_affine(row, work)
    load_kernel("weighted_scales", "write_scales_q4_k")(
        work.fit, 63, work.levels, out.reshape(-1, row.block_bytes)
    )
    load_kernel("q5_k", "write_quants_q5_k")(x, *_left_quants(row, work, out), out)


def _left_quants(row: _Row, work: _Work, out: UInt8) -> tuple[Float32, Float32]:
    """Return what gives the quants of sub-blocks whose scale was rounded to zero: inverses and minima."""
    n = out.size // row.block_bytes * row.subs
    return work.fit_row(3, n), work.fit_row(4, n)


def _write_q3_k(row: _Row, work: _Work, x: Float32, out: UInt8) -> None:
    _search_symmetric(row, work)
    load_kernel("weighted_symmetric", "write_scales_q3_k")(work.fit, work.levels, out)
    load_kernel("q3_k", "write_quants_q3_k")(x, work.quants, work.levels, out)


def _write_q6_k(row: _Row, work: _Work, x: Float32, out: UInt8) -> None:
    _search_symmetric(row, work)
    n = out.size // row.block_bytes * row.subs
    load_kernel("q6_k", "write_q6_k")(
        x, work.fit_row(0, n), work.fit_row(1, n), work.fit_row(2, n), work.levels, out
    )


def _write_iq4(row: _Row, work: _Work, x: Float32, out: UInt8) -> None:
    load_kernel("iq4", "search_iq4")(work.tile, work.weights, work.fit)
    n = out.size // row.block_bytes * row.subs
    name = "write_iq4_nl" if row.subs == 1 else "write_iq4_xs"
    load_kernel("iq4", name)(x, work.fit_row(1, n), out)


def _write_symmetric(row: _Row, work: _Work, x: Float32, out: UInt8) -> None:
    _search_symmetric(row, work)
    name = "write_q4_0_weighted" if row.top == 8 else "write_q5_0_weighted"
    load_kernel("weighted_symmetric", name)(work.fit, work.quants, out)


def _write_affine(row: _Row, work: _Work, x: Float32, out: UInt8) -> None:
    _search_affine(row, work)
    name = "write_q4_1_weighted" if row.top == 15 else "write_q5_1_weighted"
    load_kernel("weighted_affine", name)(work.fit, work.quants, out)


_WRITERS: dict[str, Callable[[_Row, _Work, Float32, UInt8], None]] = {
    "Q2_K": _write_q2_k,
    "Q3_K": _write_q3_k,
    "Q4_K": _write_q4_k,
    "Q5_K": _write_q5_k,
    "Q6_K": _write_q6_k,
    "IQ4_NL": _write_iq4,
    "IQ4_XS": _write_iq4,
    "Q4_0": _write_symmetric,
    "Q4_1": _write_affine,
    "Q5_0": _write_symmetric,
    "Q5_1": _write_affine,
}

_SYMMETRIC, _AFFINE = "weighted_symmetric.search_symmetric", "weighted_affine.search_affine"
_KERNELS: dict[str, tuple[str, ...]] = {
    "Q2_K": (_AFFINE, "weighted_scales.write_scales_q2_k", "q2_k.write_quants_q2_k"),
    "Q3_K": (_SYMMETRIC, "weighted_symmetric.write_scales_q3_k", "q3_k.write_quants_q3_k"),
    "Q4_K": (_AFFINE, "weighted_scales.write_scales_q4_k", "q4_k.write_quants_q4_k"),
    "Q5_K": (_AFFINE, "weighted_scales.write_scales_q4_k", "q5_k.write_quants_q5_k"),
    "Q6_K": (_SYMMETRIC, "q6_k.write_q6_k"),
    "IQ4_NL": ("iq4.search_iq4", "iq4.write_iq4_nl"),
    "IQ4_XS": ("iq4.search_iq4", "iq4.write_iq4_xs"),
    "Q4_0": (_SYMMETRIC, "weighted_symmetric.write_q4_0_weighted"),
    "Q4_1": (_AFFINE, "weighted_affine.write_q4_1_weighted"),
    "Q5_0": (_SYMMETRIC, "weighted_symmetric.write_q5_0_weighted"),
    "Q5_1": (_AFFINE, "weighted_affine.write_q5_1_weighted"),
}


def weighted_kernels(dtype: str) -> set[str]:
    """Name the kernels (FILE.KERNEL) that encode one of `WEIGHTED_TYPES`."""
    return {"importance.gather_weighted", *_KERNELS[dtype]}
