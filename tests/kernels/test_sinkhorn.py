"""Sparse Sinkhorn against POT's dense one with infinite cost off the support."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import logsumexp

from edgemerge.alignment.transport import REG, select_support, solve_sinkhorn
from edgemerge.kernels import sinkhorn

Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]


def random_cost(n: int, seed: int) -> Float64:
    cost = np.random.default_rng([n, seed]).uniform(size=(n, n))
    return cost / cost.max()


def planted_cost(n: int, seed: int) -> Float64:
    """Near zero at a hidden permutation, near one elsewhere: what permuted heads look like."""
    rng = np.random.default_rng([n, seed])
    cost = rng.uniform(0.9, 1.0, (n, n))
    cost[np.arange(n), rng.permutation(n)] = rng.uniform(0.0, 0.1, n)
    return cost


def forbid(cost: Float64, indptr: Int32, indices: Int32) -> Float64:
    """The cost with infinity off the support."""
    barred = np.full_like(cost, np.inf)
    rows = np.repeat(np.arange(len(cost)), np.diff(indptr))
    barred[rows, indices] = cost[rows, indices]
    return barred


def spread(n: int, indptr: Int32, indices: Int32, values: Float64) -> Float64:
    matrix = np.zeros((n, n))
    matrix[np.repeat(np.arange(n), np.diff(indptr)), indices] = values
    return matrix


def allowed_costs(cost: Float64, indptr: Int32, indices: Int32) -> Float64:
    return np.ascontiguousarray(cost[np.repeat(np.arange(len(cost)), np.diff(indptr)), indices])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n", [5, 8, 9, 32, 64])
@pytest.mark.parametrize(("make", "reg"), [(planted_cost, REG), (random_cost, 0.05)])
def test_equals_pot(make: Callable[[int, int], Float64], reg: float, n: int, seed: int) -> None:
    """Costs without structure take either solver over 5000 sweeps at the weight used for heads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of optional backends that are not installed
        import ot
    cost = make(n, seed)
    indptr, indices = select_support(cost)
    _, plan, _, converged = solve_sinkhorn(
        allowed_costs(cost, indptr, indices), indptr, indices, reg
    )
    mass = np.full(n, 1 / n)
    barred = forbid(cost, indptr, indices)
    theirs = ot.bregman.sinkhorn_log(
        mass, mass, barred, reg, numItermax=20000, stopThr=1e-12, warn=False
    )
    assert converged
    ours = spread(n, indptr, indices, plan)
    assert np.abs(ours - theirs).max() < 1e-8
    np.testing.assert_allclose(ours.sum(axis=1), mass, rtol=1e-12)
    assert np.abs(ours.sum(axis=0) - mass).sum() < 1e-9


def test_no_convergence_is_reported() -> None:
    cost = random_cost(8, 2)
    indptr, indices = select_support(cost)
    _, plan, iterations, converged = solve_sinkhorn(cost.reshape(-1), indptr, indices, 0.005)
    assert not converged
    assert iterations >= 5000
    assert np.isfinite(plan).all()


@pytest.mark.parametrize("n", [1, 5, 20])
def test_one_sweep(n: int) -> None:
    cost = random_cost(n, 7)
    indptr, indices = select_support(cost, 3)
    reg = 0.05
    duals = np.random.default_rng(1).standard_normal((2, n))
    barred = forbid(cost, indptr, indices)
    g = reg * (-np.log(n) - logsumexp((duals[0][:, None] - barred) / reg, axis=0))
    f = reg * (-np.log(n) - logsumexp((g - barred) / reg, axis=1))
    allowed, work = allowed_costs(cost, indptr, indices), np.empty((2, n))
    sinkhorn.sweep(allowed, indptr, indices, reg, 1, work, duals)
    np.testing.assert_allclose(duals, [f, g], rtol=1e-12, atol=1e-12)
    plan = np.empty(len(allowed))
    sinkhorn.fill_plan(allowed, indptr, indices, reg, duals, plan)
    wanted = np.exp((f[:, None] + g - barred) / reg)
    np.testing.assert_allclose(spread(n, indptr, indices, plan), wanted, rtol=1e-10)


def test_huge_potentials_do_not_overflow() -> None:
    """exp(-cost / reg) is zero in float64 for all of these; the log domain does not mind."""
    cost = 1e6 + random_cost(12, 3)
    indptr, indices = select_support(cost)
    allowed, duals, work = (
        allowed_costs(cost, indptr, indices),
        np.zeros((2, 12)),
        np.empty((2, 12)),
    )
    sinkhorn.sweep(allowed, indptr, indices, 0.02, 500, work, duals)
    plan = np.empty(len(allowed))
    sinkhorn.fill_plan(allowed, indptr, indices, 0.02, duals, plan)
    sums = np.bincount(indices, plan, minlength=12)
    np.testing.assert_allclose(sums, 1 / 12, rtol=1e-6)
