"""Calls of the kernels that merges use most, with arguments of every shape that these take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgemerge.methods.blocks import ELECTION_TILE, NON_FINITE, RANK_BINS, SUM_LANES

N_MODELS = 3


@dataclass(frozen=True)
class MergeCall:
    """Arguments of one kernel, and the bytes of the arrays that it reads and writes, each once."""

    arguments: list[Any]
    n_bytes: int


def merge_calls(n_rows: int, n_cols: int) -> dict[str, MergeCall]:
    """Return a call of each kernel (FILE.KERNEL), for blocks of three models and their base.

    Numbers stay what they are, or near, when a call is repeated: kernels that overwrite their input have
    weights of one, or little to add. `della.drop_by_rank` is the exception: it needs its input again.
    """
    n = n_rows * n_cols
    rng = np.random.default_rng(1)
    models = rng.standard_normal((N_MODELS, n)).astype(np.float32)
    changes, votes, base = models.copy(), models.copy(), models[0].copy()
    x, y, z = models[1].copy(), models[2].copy(), models[2].copy()
    high, low = np.zeros(2**15, np.uint32), np.zeros(2**16, np.uint32)
    ones, third = np.ones(N_MODELS, np.float32), np.full(N_MODELS, 1 / N_MODELS, np.float32)
    tiles, tied = np.empty((3, ELECTION_TILE), np.float32), np.empty(2, np.int64)
    ranks = np.empty(5 * n_cols + RANK_BINS + 1, np.uint32)
    lanes, sums, dots = np.empty(SUM_LANES), np.empty((n_rows, 1)), np.empty((n_rows, 3))
    grams, count = np.empty((n_rows, N_MODELS, N_MODELS)), np.empty(1, np.int64)
    factors = np.full((n_rows, N_MODELS), 1 / N_MODELS, np.float32)
    middle, largest = int(np.float32(0.7).view(np.int32)), int(np.float32(9).view(np.int32))
    key, nothing = np.uint64(12345), np.uint64(2**24)  # is dropped
    all_models, one = models.nbytes, x.nbytes
    calls: dict[str, tuple[list[Any], int]] = {
        "linear.weighted_sum": ([third, models], all_models + one),
        "linear.subtract": ([np.zeros_like(y), y, count], 3 * one),
        "linear.add_scaled": ([x, 0.01, base], 3 * one),
        "linear.add_changes": (
            [third, 0.01, changes, NON_FINITE, count, base],
            all_models + 3 * one,
        ),
        "gram.combine_rows": ([factors, n_cols, models], all_models + one),
        "linear.add_deltas": ([third, ones, 0.01, changes, base], all_models + 3 * one),
        "ties.elect": ([ones, ones, True, 0.0, tiles, votes, base], 2 * all_models + 2 * one),
        "select.count_high": ([x, high], one),
        "select.count_low": ([x, middle >> 16, low], one),
        "select.count_ties": ([middle, largest, x, tied], one),
        "select.keep_between": ([0, largest, y], 2 * one),
        "dare.drop_random": ([key, key, nothing, y], 2 * one),
        "della.drop_by_rank": ([key, key, n_cols, 0.5, 0.1, False, ranks, z], 2 * one),
        "norms.row_norms": ([x, n_cols, 0, lanes, sums], one),
        "norms.count_overflows": ([x, NON_FINITE, count], one),
        "gram.row_dots": ([x, y, n_cols, lanes, dots], 2 * one),
        "gram.row_grams": ([models, n_cols, lanes, grams], all_models),
        "sce.variances": ([models, y], all_models + one),
        "sce.add_agreeing": ([third, models, base], all_models + 2 * one),
        "nearswap.swap_near": ([1e-6, x, base], 3 * one),
    }
    return {name: MergeCall(*call) for name, call in calls.items()}
