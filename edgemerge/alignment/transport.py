"""Optimal matching of attention heads: sparse Sinkhorn, rounded to a permutation, and certified.

A layer may permute its KV groups, and the query heads inside each group. The cheapest permutation is found
exactly in two levels: first the best order of heads for every pair of groups, then the best matching of
groups at these costs. Costs are small dense matrices, at most 128 x 128 or so; `edgemerge.alignment.heads`
makes them.

An exact assignment is cheap at these sizes. Sinkhorn adds three things to it: the soft plan that `--align
soft` applies, the confidence of every match, and duals that prove a permutation optimal. The proof spares
SciPy's solver, whose import takes 50 MiB and a third of a second: it is asked only where two rows want one
column, or where the proof fails. POT's solver gives the same permutation. Its import takes 170 MiB where
scikit-learn is installed, which no budget foresees, so POT is the yardstick of the tests alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import permutations
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgemerge.alignment.records import Mix
from edgemerge.native import KernelFile

__all__ = ["GUARD", "Match", "Transport", "assign", "match_heads", "select_support", "transport"]

sinkhorn = KernelFile("sinkhorn")

Float64: TypeAlias = NDArray[np.float64]
Int32: TypeAlias = NDArray[np.int32]
Index: TypeAlias = NDArray[np.int64]

GUARD = 0.05  # tau: least relative gain for which heads are reordered at all
REG = 0.02  # entropy weight where the largest cost is 1; below 0.01 it takes over 20000 sweeps
SHRINK = 4.0  # of the entropy weight from one stage to the next
SUPPORT = 8  # cheapest partners per row and per column; 3 were seen to miss the optimum of n = 64
CHECK_EVERY = 10  # sweeps
MAX_SWEEPS = 5000
TOLERANCE = 1e-9  # of the column sums, in the 1-norm, in the last stage
STAGE_TOLERANCE = 1e-3  # and in those before it
GAP = 1e-3  # relative; above it the exact solver is asked
ROUNDING = 1e-12  # relative to the largest cost
MAX_BRUTE_FORCE = 5  # heads in a group: 120 orders
NEGLIGIBLE = 1e-12  # weight of a head below which a soft plan does not read it


@dataclass(frozen=True, slots=True)
class Transport:
    """A matching of n things to n others, and what is known of its quality."""

    permutation: Index  # (n,), row i -> column
    indptr: Int32  # (n + 1,) of the support
    indices: Int32  # (nnz,)
    plan: Float64  # (nnz,) entropic plan on the support; rows and columns sum to 1/n
    gap: float  # mean cost minus a lower bound, unit of cost; 0 where the exact solver was asked
    confidence: float  # least over rows of n * max_j P_ij
    iterations: int
    converged: bool
    exact: bool


@dataclass(frozen=True, slots=True)
class Match:
    """A legal permutation of one layer's heads; costs are means over all parts of all heads."""

    kv_groups: tuple[int, ...]
    heads: tuple[int, ...]
    identity_cost: float
    cost: float
    gap: float
    confidence: float
    iterations: int
    converged: bool
    exact: bool
    guarded: bool
    soft_groups: Mix
    soft_heads: Mix


def match_heads(head_cost: Float64, group_cost: Float64, *, guard: float = GUARD) -> Match:
    """Find the cheapest permutation of KV groups and of the query heads inside them.

    Minimises sum_g [group_cost[g, pi(g)] + sum_j head_cost[(g, j), (pi(g), sigma_g(j))]] over the wreath
    product of S_r and S_n_kv: the inner minimum of every pair of groups first, then the groups.

    Parameters
    ----------
    head_cost : (n_heads, n_heads) float64
        D_q / S_q + D_o / S_o: cost of the reference's head (row) taking the other's (column)
    group_cost : (n_kv_heads, n_kv_heads) float64
        D_k / S_k + D_v / S_v, likewise; n_kv_heads divides n_heads
    guard : float
        identity is kept unless the best matching saves at least this fraction of its cost

    Returns
    -------
    Match
        Hard permutation and soft weights; both the identity where the guard holds.
    """
    n_groups = len(group_cost)
    r = len(head_cost) // n_groups
    n_parts = 2 + 2 * r  # k, v and r times q, o: the mean over parts is 1 for unrelated heads
    inner_cost, inner = _order_heads(head_cost.reshape(n_groups, r, n_groups, r))
    cost = (group_cost + inner_cost) / n_parts
    identity = (np.trace(group_cost) + np.trace(head_cost)) / (n_groups * n_parts)
    found = transport(cost)
    rows = np.arange(n_groups)
    best = float(cost[rows, found.permutation].mean())
    gain = float(identity) - best
    guarded = gain <= 0.0 or gain < guard * identity
    groups, soft_groups = found.permutation, _weights(found)
    if guarded:
        # The guard is for the whole layer, so heads inside groups stay too.
        groups, inner = rows, np.broadcast_to(np.arange(r), inner.shape)
        soft_groups = tuple(((g, 1.0),) for g in range(n_groups))
    heads = (groups[:, None] * r + inner[rows, groups]).reshape(-1)
    soft_heads = tuple(
        tuple((other * r + int(inner[g, other, j]), weight) for other, weight in soft_groups[g])
        for g in range(n_groups)
        for j in range(r)
    )
    return Match(
        kv_groups=tuple(groups.tolist()),
        heads=tuple(heads.tolist()),
        identity_cost=float(identity),
        cost=best,
        gap=found.gap,
        confidence=found.confidence,
        iterations=found.iterations,
        converged=found.converged,
        exact=found.exact,
        guarded=bool(guarded and gain > ROUNDING),
        soft_groups=soft_groups,
        soft_heads=soft_heads,
    )


def transport(cost: Float64, n_best: int = SUPPORT) -> Transport:
    """Match rows to columns at the least cost: Sinkhorn, rounded, certified, exact where in doubt.

    Example with three rows::

        cost         4  1  3      n * plan    0.00  0.96  0.03      permutation   1  0  2
                     2  0  5                  0.96  0.04  0.00
                     3  2  2                  0.03  0.00  0.97

    Column 1 is the cheapest of rows 0 and 1. Row 1 gives it up, as that costs less in sum: 1 + 2 + 2. The
    entropic plan is close to that permutation: the least of its largest entries, 0.96, is `confidence`. Its
    duals prove that no permutation is cheaper, so `gap` is 0 and the exact solver is not asked.

    Parameters
    ----------
    cost : (n, n) float64
        >= 0, any unit
    n_best : int
        as for `select_support`

    Returns
    -------
    Transport
        Its permutation is optimal within `gap`.
    """
    n = len(cost)
    top = float(cost.max())
    if n == 1 or top <= 0.0:
        return _stay(n)
    indptr, indices = select_support(cost, n_best)
    scaled = cost / top
    allowed = _gather(scaled, indptr, indices)
    duals, plan, iterations, converged = solve_sinkhorn(allowed, indptr, indices)
    # -log P is the cost plus a number per row and one per column, which change no optimum: rounding is
    # exact on the support, and only what the support cut off can be missed.
    excess = np.full((n, n), np.inf)
    rows = np.repeat(np.arange(n), np.diff(indptr))
    excess[rows, indices] = (allowed - duals[0][rows] - duals[1][indices]) / REG
    permutation = assign(excess)
    gap, feasible = _certify(scaled, duals, permutation, np.isfinite(excess))
    gap = 0.0 if gap <= ROUNDING else gap
    mean_cost = float(scaled[np.arange(n), permutation].mean())
    exact = gap > GAP * mean_cost + ROUNDING or not feasible
    if exact:
        permutation, gap = _solve_exactly(scaled, permutation), 0.0
    confidence = min(1.0, float(np.maximum.reduceat(plan, indptr[:-1]).min()) * n)
    return Transport(
        permutation,
        indptr,
        indices,
        plan,
        gap * top,
        confidence,
        iterations,
        converged,
        exact,
    )


def select_support(cost: Float64, n_best: int = SUPPORT) -> tuple[Int32, Int32]:
    """Choose the pairs that Sinkhorn looks at: each row's and each column's cheapest, and the diagonal.

    The diagonal is a perfect matching, without which scaling need not converge (Sinkhorn and Knopp
    1967). Matrices of up to `n_best` rows are taken whole.

    Parameters
    ----------
    cost : (n, n) float64
        cost of each pair
    n_best : int
        partners per row and per column

    Returns
    -------
    indptr, indices : (n + 1,), (nnz,) int32
        CSR pattern, columns ascending.
    """
    n = len(cost)
    chosen = np.eye(n, dtype=bool)
    if n <= n_best:
        chosen[:] = True
    else:
        rows = np.arange(n)[:, None]
        # Stable, so that ties fall to the lower index on every machine.
        chosen[rows, np.argsort(cost, axis=1, kind="stable")[:, :n_best]] = True
        chosen[np.argsort(cost, axis=0, kind="stable")[:n_best].T, rows] = True
    indptr = np.zeros(n + 1, np.int32)
    indptr[1:] = np.cumsum(chosen.sum(axis=1))
    return indptr, np.nonzero(chosen)[1].astype(np.int32)


def solve_sinkhorn(
    cost: Float64, indptr: Int32, indices: Int32, reg: float = REG
) -> tuple[Float64, Float64, int, bool]:
    """Run Sinkhorn with a falling entropy weight, each stage starting from the last one's duals.

    Parameters
    ----------
    cost : (nnz,) float64
        cost of each allowed pair, the largest about 1
    indptr, indices : (n + 1,), (nnz,) int32
        CSR pattern
    reg : float
        entropy weight of the last stage

    Returns
    -------
    duals : (2, n) float64
    plan : (nnz,) float64
    iterations : int
        Sweeps of all stages.
    converged : bool
        Whether the columns of the plan sum to 1/n within `TOLERANCE`; if not, rounding still follows.
    """
    n = len(indptr) - 1
    duals, work, plan = np.zeros((2, n)), np.empty((2, n)), np.empty(len(cost))
    stages = [float(cost.max())]
    while stages[-1] > reg:
        stages.append(max(reg, stages[-1] / SHRINK))
    stages[-1] = reg
    iterations, error = 0, math.inf
    for stage in stages:
        tolerance = TOLERANCE if stage == reg else STAGE_TOLERANCE
        for _ in range(MAX_SWEEPS // CHECK_EVERY):
            sinkhorn.sweep(cost, indptr, indices, stage, CHECK_EVERY, work, duals)
            sinkhorn.fill_plan(cost, indptr, indices, stage, duals, plan)
            iterations += CHECK_EVERY
            sums = np.bincount(indices, plan, minlength=n)
            error = float(np.abs(sums - 1.0 / n).sum())
            if error < tolerance:
                break
    return duals, plan, iterations, error < TOLERANCE


# -- parts -------------------------------------------------------------------------------------------


def _order_heads(blocks: Float64) -> tuple[Float64, Index]:
    """Find the best order of heads for every pair of groups.

    `blocks[g, j, h, i]` is the cost of head j of group g taking head i of group h. Returns the costs
    (n, n) and the orders (n, n, r); of equals, the first in lexicographic order, so the identity.
    """
    n, r = blocks.shape[:2]
    if r <= MAX_BRUTE_FORCE:
        orders = np.array(list(permutations(range(r))))
        totals = np.zeros((n, n, len(orders)))
        for j in range(r):
            totals += blocks[:, j][:, :, orders[:, j]]
        return totals.min(axis=2), orders[totals.argmin(axis=2)]
    costs, inner = np.empty((n, n)), np.empty((n, n, r), np.int64)
    for g in range(n):
        for h in range(n):
            pair = blocks[g, :, h]
            inner[g, h] = assign(pair)
            costs[g, h] = pair[np.arange(r), inner[g, h]].sum()
    return costs, inner


def assign(cost: Float64) -> Index:
    """Solve the linear assignment problem exactly (SciPy's solver: Crouse 2016).

    Parameters
    ----------
    cost : (n, n) float
        infinite entries are forbidden

    Returns
    -------
    (n,) int64
        Column of each row.
    """
    best: Index = cost.argmin(axis=1)
    if len(np.unique(best)) == len(best):
        return best  # every row has its own cheapest: nothing can be cheaper
    from scipy.optimize import linear_sum_assignment

    columns: Index = linear_sum_assignment(cost)[1].astype(np.int64)
    return columns


def _certify(
    cost: Float64, duals: Float64, permutation: Index, allowed: NDArray[np.bool_]
) -> tuple[float, bool]:
    """Bound what any permutation could save, by weak duality on the full cost.

    With f~_i = min_j (C_ij - g_j) every permutation costs at least (sum f~ + sum g) / n. Also tells
    whether the entropic duals are feasible off the support: if not, it may have cut the optimum.
    """
    f, g = duals
    bound = float(((cost - g).min(axis=1) + g).mean())
    found = float(cost[np.arange(len(cost)), permutation].mean())
    slack = np.where(allowed, 0.0, cost - f[:, None] - g)
    return found - bound, bool(slack.min() >= -ROUNDING)


def _solve_exactly(cost: Float64, permutation: Index) -> Index:
    """Assign on the full cost, and keep what we have if it is as cheap."""
    rows, exact = np.arange(len(cost)), assign(cost)
    saved = cost[rows, permutation].sum() - cost[rows, exact].sum()
    return exact if saved > ROUNDING * len(cost) else permutation


def _stay(n: int) -> Transport:
    """Match everything to itself, where there is one row or all costs are zero."""
    indptr, mass = np.arange(n + 1, dtype=np.int32), np.full(n, 1.0 / n)
    return Transport(np.arange(n), indptr, indptr[:-1].copy(), mass, 0.0, 1.0, 0, True, False)


def _gather(cost: Float64, indptr: Int32, indices: Int32) -> Float64:
    rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    return np.ascontiguousarray(cost[rows, indices])


def _weights(found: Transport) -> Mix:
    """Barycentric weights T = n P of the plan: for each row, the columns it mixes."""
    n = len(found.indptr) - 1
    mix = []
    for i in range(n):
        at = slice(found.indptr[i], found.indptr[i + 1])
        weights = zip(found.indices[at].tolist(), (n * found.plan[at]).tolist(), strict=True)
        mix.append(tuple((j, weight) for j, weight in weights if weight > NEGLIGIBLE))
    return tuple(mix)
