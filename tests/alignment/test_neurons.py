"""Permuted neurons: the function stays, and hidden ones are found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgemerge.alignment.neurons import NeuronPlan, match_neurons
from edgemerge.alignment.records import Skipped
from edgemerge.formats import open_model
from tests.support.head_models import ArraySource

Float32 = NDArray[np.float32]


def noisy(
    tensors: Mapping[str, Float32], size: float, rng: np.random.Generator
) -> dict[str, Float32]:
    return {
        k: x + np.float32(size) * rng.standard_normal(x.shape, np.float32)
        for k, x in tensors.items()
    }


def feed_forward(gate: Float32, up: Float32, down: Float32, x: Float32) -> NDArray[np.float64]:
    a = x.astype(np.float64) @ gate.T
    return (a / (1 + np.exp(-a)) * (x @ up.T)) @ down.T


def ffn(n: int, d: int, seed: int = 0) -> dict[str, Float32]:
    rng = np.random.default_rng(seed)
    shapes = {"gate": (n, d), "up": (n, d), "down": (d, n)}
    return {
        f"blk.0.ffn_{part}.weight": rng.standard_normal(shape).astype(np.float32)
        for part, shape in shapes.items()
    }


def permute(tensors: Mapping[str, Float32], order: NDArray[np.int64]) -> dict[str, Float32]:
    return {k: x[:, order] if "down" in k else x[order] for k, x in tensors.items()}


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_neurons_are_found_and_change_nothing(noise: float) -> None:
    rng = np.random.default_rng(5)
    a = ffn(200, 96)
    hidden = rng.permutation(200)
    b = permute(noisy(a, noise, rng), hidden)
    (plan,) = match_neurons(ArraySource(a), ArraySource(b))
    assert isinstance(plan, NeuronPlan)
    assert np.array_equal(hidden[plan.order], np.arange(200))
    assert plan.cost < plan.identity_cost
    x = rng.standard_normal((5, 96)).astype(np.float32)
    restored = {}
    for name, values in b.items():
        rows, columns = plan.row_order(name, len(values)), plan.column_order(name, values.shape[-1])
        assert (rows is None) != (columns is None)
        restored[name] = values[rows] if rows is not None else values[:, columns]
    outputs = []
    for model in (b, restored):
        gate, up, down = model.values()
        outputs.append(feed_forward(gate, up, down, x))
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-9, atol=1e-6)
    if not noise:
        assert plan.cost == pytest.approx(0.0, abs=1e-6)
        assert all(np.array_equal(restored[k], a[k]) for k in a)


def test_neurons_of_a_fused_gate_and_up() -> None:
    rng = np.random.default_rng(6)
    a = ffn(60, 32)
    b = permute(a, rng.permutation(60))
    fused = [
        {
            "blk.0.ffn_up.weight": np.concatenate(
                [m["blk.0.ffn_gate.weight"], m["blk.0.ffn_up.weight"]]
            ),
            "blk.0.ffn_down.weight": m["blk.0.ffn_down.weight"],
        }
        for m in (a, b)
    ]
    (plan,) = match_neurons(*map(ArraySource, fused))
    assert isinstance(plan, NeuronPlan)
    order = plan.row_order("blk.0.ffn_up.weight", 120)
    assert order is not None
    assert np.array_equal(fused[1]["blk.0.ffn_up.weight"][order], fused[0]["blk.0.ffn_up.weight"])


def test_neurons_of_the_real_models(models_dir: Path) -> None:
    """Fine-tunes keep theirs; shuffled ones are found."""
    base, expert = (open_model(models_dir / name) for name in ("base", "expert-a"))
    for plan in match_neurons(base, expert):
        assert isinstance(plan, NeuronPlan)
        assert np.array_equal(plan.order, np.arange(512))
    tensors = {}
    for name, spec in expert.specs().items():
        if ".ffn_" in name and "norm" not in name and name.startswith("blk.2."):
            raw = np.empty(spec.nbytes, np.uint8)
            expert.read_rows(name, 0, spec.n_rows, raw)
            tensors[name] = raw.view(np.float16).reshape(spec.shape).astype(np.float32)
    hidden = np.random.default_rng(0).permutation(512)
    (plan,) = match_neurons(base, ArraySource(permute(tensors, hidden)))
    assert isinstance(plan, NeuronPlan)
    assert np.array_equal(hidden[plan.order], np.arange(512))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ffn_gate_inp.weight": (4, 32)}, "how ffn_gate_inp.weight depends on neurons"),
        ({"ffn_up.bias": (60,)}, "alike"),
        ({"ffn_up.weight": (61, 32)}, "alike"),
    ],
)
def test_layers_whose_neurons_stay_say_why(
    changes: dict[str, tuple[int, ...]], reason: str
) -> None:
    a = ffn(60, 32)
    b = a | {f"blk.0.{stem}": np.zeros(shape, np.float32) for stem, shape in changes.items()}
    (found,) = match_neurons(ArraySource(a), ArraySource(b))
    assert isinstance(found, Skipped)
    assert reason in found.reason
