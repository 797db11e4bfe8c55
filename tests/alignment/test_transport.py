"""Matchings of heads against POT's exact solver and against trying everything."""

from __future__ import annotations

import subprocess
import sys
import warnings
from itertools import permutations, product
from types import ModuleType

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from edgemerge.alignment.transport import match_heads, select_support, transport
from edgemerge.budget import SOLVER_BYTES

Float64 = NDArray[np.float64]


@pytest.fixture(scope="module")
def ot() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of optional backends that are not installed
        return pytest.importorskip("ot")


def random_cost(n: int, seed: int) -> Float64:
    return np.random.default_rng([n, seed]).uniform(size=(n, n))


def mean_cost(cost: Float64, permutation: NDArray[np.int64]) -> float:
    return float(cost[np.arange(len(cost)), permutation].mean())


# -- one matching ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [2, 3, 8, 9, 32, 128])
def test_as_cheap_as_pots_exact_solution(ot: ModuleType, n: int, seed: int) -> None:
    cost = 1000.0 * random_cost(n, seed)
    found = transport(cost)
    assert sorted(found.permutation.tolist()) == list(range(n))
    mass = np.full(n, 1 / n)
    assert mean_cost(cost, found.permutation) == pytest.approx(ot.emd2(mass, mass, cost), rel=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_a_support_that_cuts_the_optimum_is_noticed(seed: int) -> None:
    """One partner per row and column misses the optimum of unstructured costs, as a rule."""
    cost = random_cost(40, seed)
    found = transport(cost, n_best=1)
    assert found.exact
    assert found.gap == 0.0
    best = linear_sum_assignment(cost)[1]
    assert mean_cost(cost, found.permutation) == pytest.approx(mean_cost(cost, best), rel=1e-9)


def test_heads_that_stand_apart_are_certified_without_the_exact_solver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The usual case needs no solver of SciPy's, nor the 50 MiB that it takes."""
    monkeypatch.setitem(sys.modules, "ot", None)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    rng = np.random.default_rng(0)
    for n in (2, 8, 32, 128):
        hidden = rng.permutation(n)
        cost = rng.uniform(0.9, 1.1, (n, n))
        cost[np.arange(n), hidden] = rng.uniform(0.0, 0.1, n)
        found = transport(cost)
        assert found.permutation.tolist() == hidden.tolist()
        assert found.gap <= 1e-9
        assert found.confidence > 0.99
        assert found.converged
        assert not found.exact


def test_a_matching_in_doubt_takes_no_more_memory_than_the_budget_reserves() -> None:
    """POT imports scikit-learn where that is installed: 171 MiB, of 72 that are reserved."""
    code = (
        "import resource, sys, numpy as np\n"
        "from edgemerge.alignment.transport import transport\n"
        "transport(np.eye(3)[::-1] + 1)\n"  # loads the kernels
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "found = transport(np.random.default_rng(0).uniform(size=(40, 40)), n_best=1)\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(found.exact, 'ot' in sys.modules, 'sklearn' in sys.modules, after - before)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    *facts, grown = done.stdout.split()
    assert facts == ["True", "False", "False"]
    assert int(grown) << 10 < SOLVER_BYTES


def test_rounding_is_no_gap() -> None:
    """Heads that stand apart are matched at the bound; what their sums differ by is rounding."""
    gaps = []
    for seed in range(40):
        cost = 0.5 + random_cost(8, seed)
        cost[np.arange(8), np.random.default_rng(seed).permutation(8)] /= 50.0
        gaps.append(transport(cost).gap)
    assert gaps == [0.0] * 40


def test_the_gap_is_a_bound() -> None:
    for seed in range(20):
        cost = random_cost(12, seed)
        found = transport(cost)
        best = mean_cost(cost, linear_sum_assignment(cost)[1])
        assert mean_cost(cost, found.permutation) - found.gap <= best + 1e-12


@pytest.mark.parametrize("cost", [np.zeros((5, 5)), np.ones((5, 5)), np.full((1, 1), 3.0)])
def test_without_a_difference_nothing_moves(cost: Float64) -> None:
    found = transport(cost)
    assert mean_cost(cost, found.permutation) == cost[0, 0]
    head_match = match_heads(cost, cost)
    assert head_match.heads == tuple(range(len(cost)))
    assert not head_match.guarded


def test_support() -> None:
    cost = random_cost(30, 0)
    indptr, indices = select_support(cost, 4)
    chosen = np.zeros((30, 30), bool)
    chosen[np.repeat(np.arange(30), np.diff(indptr)), indices] = True
    for i in range(30):
        assert chosen[i, i]
        assert chosen[i, np.argsort(cost[i], kind="stable")[:4]].all()
        assert chosen[np.argsort(cost[:, i], kind="stable")[:4], i].all()
    assert chosen.sum() <= 30 * 9
    assert (np.diff(indices)[np.diff(np.repeat(np.arange(30), np.diff(indptr))) == 0] > 0).all()
    indptr, _ = select_support(random_cost(8, 0))
    assert indptr[-1] == 64


# -- groups and heads -------------------------------------------------------------------------------


def every_legal_cost(head_cost: Float64, group_cost: Float64) -> list[float]:
    """Costs of all elements of S_r wr S_n."""
    n = len(group_cost)
    r = len(head_cost) // n
    costs = []
    for groups in permutations(range(n)):
        for orders in product(permutations(range(r)), repeat=n):
            total = sum(group_cost[g, groups[g]] for g in range(n))
            for g, j in product(range(n), range(r)):
                total += head_cost[g * r + j, groups[g] * r + orders[g][j]]
            costs.append(total / (n * (2 + 2 * r)))
    return costs


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("n_kv", "r"), [(1, 1), (5, 1), (3, 2), (4, 2), (2, 3), (1, 5), (1, 6)])
def test_two_levels_are_exact(n_kv: int, r: int, seed: int) -> None:
    rng = np.random.default_rng([n_kv, r, seed])
    head_cost, group_cost = rng.uniform(size=(n_kv * r,) * 2), rng.uniform(size=(n_kv, n_kv))
    match = match_heads(head_cost, group_cost, guard=0.0)
    assert match.cost == pytest.approx(min(every_legal_cost(head_cost, group_cost)), rel=1e-12)
    identity = (np.trace(head_cost) + np.trace(group_cost)) / (n_kv * (2 + 2 * r))
    assert match.identity_cost == pytest.approx(identity)


@pytest.mark.parametrize(("n_kv", "r"), [(1, 8), (8, 1), (8, 4), (4, 8), (32, 1), (2, 16)])
def test_heads_follow_their_groups(n_kv: int, r: int) -> None:
    rng = np.random.default_rng([n_kv, r])
    head_cost, group_cost = rng.uniform(size=(n_kv * r,) * 2), rng.uniform(size=(n_kv, n_kv))
    match = match_heads(head_cost, group_cost)
    assert sorted(match.heads) == list(range(n_kv * r))
    assert sorted(match.kv_groups) == list(range(n_kv))
    assert all(old // r == match.kv_groups[new // r] for new, old in enumerate(match.heads))


@pytest.mark.parametrize(("saving", "moves"), [(0.049, False), (0.051, True)])
def test_identity_is_kept_for_little(saving: float, moves: bool) -> None:
    """Two groups of one head; swapping them costs `saving` less, of a cost of 1 per part."""
    swap = np.array([[1.0, 1 - saving], [1 - saving, 1.0]])
    match = match_heads(swap, swap)
    assert match.heads == ((1, 0) if moves else (0, 1))
    assert match.guarded is not moves
    # Reported is what was found, used or not: two parts, each of mean cost 1/2 (of 4 that two make).
    assert match.cost == pytest.approx((1 - saving) / 2)
    if not moves:
        assert match.soft_heads == (((0, 1.0),), ((1, 1.0),))


# -- soft -----------------------------------------------------------------------------------------------


def as_matrix(mix: tuple[tuple[tuple[int, float], ...], ...]) -> Float64:
    matrix = np.zeros((len(mix), len(mix)))
    for i, sources in enumerate(mix):
        for j, weight in sources:
            matrix[i, j] += weight
    return matrix


def test_soft_weights_are_the_barycentric_projection() -> None:
    rng = np.random.default_rng(5)
    n, r = 6, 2
    # Groups that are hard to tell apart, so that the plan is spread out.
    group_cost = 1.0 + 0.05 * rng.uniform(size=(n, n))
    head_cost = 1.0 + 0.05 * rng.uniform(size=(n * r, n * r))
    match = match_heads(head_cost, group_cost, guard=0.0)
    groups, heads = as_matrix(match.soft_groups), as_matrix(match.soft_heads)
    assert (groups > 0.02).sum() > n
    for matrix in (groups, heads):
        np.testing.assert_allclose(matrix.sum(axis=1), 1.0, rtol=1e-9)
        np.testing.assert_allclose(matrix.sum(axis=0), 1.0, rtol=1e-6)
    # Seen by groups, heads are mixed as their groups are.
    np.testing.assert_allclose(heads.reshape(n, r, n, r).sum(axis=3)[:, 0], groups, rtol=1e-12)


def test_soft_is_hard_where_heads_stand_apart() -> None:
    rng = np.random.default_rng(6)
    cost = np.ones((6, 6))
    hidden = rng.permutation(6)
    cost[np.arange(6), hidden] = 0.0
    match = match_heads(cost, cost)
    wanted = np.eye(6)[hidden]
    np.testing.assert_allclose(as_matrix(match.soft_heads), wanted, atol=1e-9)
    assert match.kv_groups == tuple(hidden.tolist())


def test_the_command_line_does_not_import_the_solvers() -> None:
    code = "import sys, edgemerge.cli as cli; cli.make_app(); "
    code += "print(*sorted({m.split('.')[0] for m in sys.modules}))"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert set(result.stdout.split()) & {"scipy", "ot", "numba"} == set()
