"""The example for Flower: adapters of clients become one, and in Flower's simulation they learn."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgemerge.errors import BudgetError, RecipeError
from edgemerge.types import Float32
from tools.flower.aggregation import aggregate, find_fault, peft_config

ROOT = Path(__file__).resolve().parents[2]
STEM = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{STEM}.lora_A.weight", f"{STEM}.lora_B.weight"
CONFIG = peft_config(2, 4, ["q_proj"])  # a scale of 2


def update(seed: int, rank: int = 2) -> dict[str, Float32]:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(rank, 6)), rng.normal(size=(5, rank))
    return {A: a.astype(np.float32), B: b.astype(np.float32)}


SENT = update(9)


def change(arrays: dict[str, Float32]) -> Float32:
    return 2 * arrays[B] @ arrays[A]


def test_svd_is_the_best_adapter_of_the_mean_change() -> None:
    updates = [update(0), update(1), update(2)]
    merged = aggregate(updates, [10, 20, 70], SENT, CONFIG, how="svd")
    assert {name: values.shape for name, values in merged.items()} == {A: (2, 6), B: (5, 2)}
    mean = sum(w * change(one) for w, one in zip((0.1, 0.2, 0.7), updates, strict=True))
    left, sizes, right = np.linalg.svd(mean)
    np.testing.assert_allclose(change(merged), (left[:, :2] * sizes[:2]) @ right[:2], atol=2e-5)


def test_clients_that_agree_get_what_they_sent() -> None:
    for how in ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"):
        density = None if how == "svd" else 1.0
        merged = aggregate([update(0)] * 3, [5, 5, 5], SENT, CONFIG, how=how, density=density)
        np.testing.assert_allclose(change(merged), change(update(0)), atol=2e-5)


def test_what_does_not_combine_changes_is_refused() -> None:
    for how in ("cat", "linear", "ties"):
        with pytest.raises(RecipeError, match="give one of svd"):
            aggregate([update(0)], [1], SENT, CONFIG, how=how)


def test_the_budget_bounds_it() -> None:
    with pytest.raises(BudgetError):
        aggregate([update(0)], [1], SENT, CONFIG, memory=1 << 20)


def test_a_client_with_other_arrays_is_found() -> None:
    sent = update(0)
    assert find_fault(update(1), sent, 1) is None
    assert find_fault({A: sent[A]}, sent, 1) == "has other arrays than were sent"
    assert "of [3, 6], not [2, 6]" in str(find_fault(update(1, rank=3), sent, 1))
    assert "as float64" in str(find_fault({A: sent[A].astype(np.float64), B: sent[B]}, sent, 1))
    assert "not finite" in str(find_fault({A: sent[A] * np.float32(np.nan), B: sent[B]}, sent, 1))


@pytest.mark.parametrize("count", [0, -3, 0.5, np.nan, np.inf, [7], "7"])
def test_a_client_without_examples_is_found(count: object) -> None:
    """Fault: where all had none, the weights were divided by zero."""
    assert str(find_fault(update(1), SENT, count)).startswith("was trained on ")


def test_a_client_with_too_large_numbers_is_found() -> None:
    """Fault: they are finite, but their product is not, and the run ended."""
    large = {name: values * np.float32(1e25) for name, values in update(1).items()}
    assert find_fault(large, SENT, 5) == f"has numbers in {A} that are too large"


@pytest.mark.parametrize("n_changed", [0, 1])
def test_what_is_sent_has_the_clients_rank(n_changed: int) -> None:
    """Fault: PEFT could not load lower ranks; where nothing changed, A and B were zero for ever."""
    updates = [update(0), update(1)]
    for one in updates:
        one[B][:, n_changed:] = 0
    updates[1][A][0], updates[1][B][:, 0] = updates[0][A][0], updates[0][B][:, 0]  # they agree
    merged = aggregate(updates, [1, 3], SENT, CONFIG)
    assert {name: values.shape for name, values in merged.items()} == {A: (2, 6), B: (5, 2)}
    np.testing.assert_allclose(change(merged), change(updates[0]), atol=2e-5)
    np.testing.assert_array_equal(merged[A][n_changed:], SENT[A][n_changed:])


@pytest.mark.slow
def test_the_simulation_learns() -> None:
    pytest.importorskip("flwr")
    pytest.importorskip("ray")
    words = ["-m", "tools.flower.simulation", "--how", "svd", "--rounds", "2", "--clients", "2"]
    result = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=600, check=True
    )
    how, _, numbers = result.stdout.splitlines()[-1].partition(": error ")
    before, first, second = map(float, numbers.split(", "))
    assert how == "svd"
    assert second < first < before / 2
