"""Rotated values and permuted neurons: the function stays, and hidden ones are found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgemerge.alignment.heads import align_models
from edgemerge.alignment.neurons import (
    NeuronPlan,
    find_rotations,
    match_neurons,
    rotate_outputs,
    rotate_values,
)
from edgemerge.formats import open_model
from edgemerge.types import HeadPlan, Skipped
from tests.support.head_models import ArraySource, head_tensors, random_order, shuffle

Float32 = NDArray[np.float32]
N_HEADS, N_KV, LENGTH, N_EMBD = 8, 4, 8, 48
SETTINGS: dict[str, Any] = {"attention_head_count": N_HEADS, "attention_head_count_kv": N_KV}


def attention(w: Mapping[str, Float32], x: Float32) -> NDArray[np.float64]:
    """Grouped-query attention of llama.cpp with rotary planes of consecutive pairs, in float64."""

    def project(module: str, n: int) -> NDArray[np.float64]:
        weight = w[f"blk.0.{module}.weight"].astype(np.float64)
        bias = w.get(f"blk.0.{module}.bias", np.zeros(len(weight), np.float32))
        return (x @ weight.T + bias).reshape(len(x), n, -1)

    q, k, v = project("attn_q", N_HEADS), project("attn_k", N_KV), project("attn_v", N_KV)
    angles = np.arange(len(x))[:, None] * 100.0 ** (-np.arange(LENGTH // 2) / (LENGTH // 2))
    turn = np.exp(1j * angles)[:, None]

    def rotary(y: NDArray[np.float64]) -> NDArray[np.complex128]:
        return (y[..., ::2] + 1j * y[..., 1::2]) * turn

    turned, keys = rotary(q), rotary(k).repeat(N_HEADS // N_KV, axis=1)
    scores = np.einsum("ihd,jhd->hij", turned, keys.conj()).real / np.sqrt(LENGTH)
    scores[:, np.triu(np.ones((len(x), len(x)), bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    heads = np.einsum("hij,jhd->ihd", weights, v.repeat(N_HEADS // N_KV, axis=1))
    return heads.reshape(len(x), -1) @ w["blk.0.attn_output.weight"].T.astype(np.float64)


def random_rotation(rng: np.random.Generator) -> Float32:
    return np.linalg.qr(rng.standard_normal((LENGTH, LENGTH)))[0].astype(np.float32)


def hide(tensors: Mapping[str, Float32], rng: np.random.Generator) -> dict[str, Float32]:
    """Rotate every group's values at random, and o back; then shuffle the heads."""
    hidden = dict(tensors)
    matrices = [random_rotation(rng) for _ in range(N_KV)]
    for name in ("blk.0.attn_v.weight", "blk.0.attn_v.bias"):
        parts = np.split(tensors[name], N_KV)
        hidden[name] = np.concatenate([m @ part for m, part in zip(matrices, parts, strict=True)])
    parts = np.split(tensors["blk.0.attn_output.weight"], N_HEADS, axis=1)
    turned = [part @ matrices[h // 2].T for h, part in enumerate(parts)]
    hidden["blk.0.attn_output.weight"] = np.concatenate(turned, axis=1)
    return shuffle(hidden, *random_order(N_HEADS, N_KV, rng))


def noisy(
    tensors: Mapping[str, Float32], size: float, rng: np.random.Generator
) -> dict[str, Float32]:
    return {
        k: x + np.float32(size) * rng.standard_normal(x.shape, np.float32)
        for k, x in tensors.items()
    }


def model(rng: np.random.Generator) -> dict[str, Float32]:
    tensors = head_tensors(N_HEADS, N_KV, n_embd=N_EMBD, key=LENGTH, value=LENGTH, seed=11)
    tensors["blk.0.attn_v.bias"] = rng.standard_normal(N_KV * LENGTH).astype(np.float32)
    return tensors


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_rotations_are_found_and_change_nothing(noise: float) -> None:
    rng = np.random.default_rng(3)
    a = model(rng)
    b = hide(noisy(a, noise, rng), rng)
    sources = ArraySource(a, **SETTINGS), ArraySource(b, **SETTINGS)
    (plan,) = align_models(*sources, arena_bytes=1 << 24)
    assert isinstance(plan, HeadPlan)
    found = find_rotations(*sources, plan)
    assert found.identity_cost > 0.6
    assert found.cost < 0.1 if noise else found.cost < 1e-6

    aligned = shuffle(b, list(plan.kv_groups), list(plan.heads))
    x = rng.standard_normal((7, N_EMBD)).astype(np.float32)
    np.testing.assert_allclose(attention(aligned, x), attention(b, x), rtol=1e-9, atol=1e-9)
    for name, width in (("blk.0.attn_v.weight", N_EMBD), ("blk.0.attn_v.bias", 1)):
        groups = np.split(aligned[name].reshape(-1, width), N_KV)
        turned = [rotate_values(found, g, part) for g, part in enumerate(groups)]
        aligned[name] = np.concatenate(turned).reshape(aligned[name].shape)
    o = aligned["blk.0.attn_output.weight"]
    aligned["blk.0.attn_output.weight"] = rotate_outputs(found, o)
    assert np.array_equal(rotate_outputs(found, o[5:9]), rotate_outputs(found, o)[5:9])
    difference = attention(aligned, x) - attention(b, x)
    assert np.abs(difference).max() < 1e-5 * np.abs(attention(b, x)).max()
    distances = [
        np.linalg.norm(aligned[n] - a[n]) / np.linalg.norm(a[n]) for n in a if "_q" not in n
    ]
    assert max(distances) < (0.4 if noise else 1e-5)


def test_values_of_fine_tunes_stay(models_dir: Path) -> None:
    sources = open_model(models_dir / "base"), open_model(models_dir / "expert-a")
    plans = align_models(*sources, arena_bytes=1 << 24)
    for plan in plans:
        assert isinstance(plan, HeadPlan)
        found = find_rotations(*sources, plan)
        assert found.cost <= found.identity_cost < 0.1


def test_a_rotation_that_gains_little_is_not_used() -> None:
    rng = np.random.default_rng(4)
    a = model(rng)
    sources = ArraySource(a, **SETTINGS), ArraySource(noisy(a, 1e-3, rng), **SETTINGS)
    (plan,) = align_models(*sources, arena_bytes=1 << 24)
    assert isinstance(plan, HeadPlan)
    found = find_rotations(*sources, plan, guard=0.9)
    assert np.array_equal(found.matrices, np.tile(np.eye(LENGTH), (N_KV, 1, 1)))


# -- neurons -----------------------------------------------------------------------------------------


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
    (plan,) = match_neurons(ArraySource(a), ArraySource(b), memory=1 << 22)
    assert isinstance(plan, NeuronPlan)
    assert np.array_equal(hidden[plan.order], np.arange(200))
    assert plan.cost < plan.identity_cost
    x = rng.standard_normal((5, 96)).astype(np.float32)
    restored = {}
    for name, values in b.items():
        rows, columns = plan.row_order(name, len(values)), plan.column_order(name)
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
    (plan,) = match_neurons(*map(ArraySource, fused), memory=1 << 22)
    assert isinstance(plan, NeuronPlan)
    order = plan.row_order("blk.0.ffn_up.weight", 120)
    assert order is not None
    assert np.array_equal(fused[1]["blk.0.ffn_up.weight"][order], fused[0]["blk.0.ffn_up.weight"])


def test_neurons_of_the_real_models(models_dir: Path) -> None:
    """Fine-tunes keep theirs; shuffled ones are found."""
    base, expert = (open_model(models_dir / name) for name in ("base", "expert-a"))
    for plan in match_neurons(base, expert, memory=16 << 20):
        assert isinstance(plan, NeuronPlan)
        assert np.array_equal(plan.order, np.arange(512))
    tensors = {}
    for name, spec in expert.specs().items():
        if ".ffn_" in name and "norm" not in name and name.startswith("blk.2."):
            raw = np.empty(spec.nbytes, np.uint8)
            expert.read_rows(name, 0, spec.n_rows, raw)
            tensors[name] = raw.view(np.float16).reshape(spec.shape).astype(np.float32)
    hidden = np.random.default_rng(0).permutation(512)
    (plan,) = match_neurons(base, ArraySource(permute(tensors, hidden)), memory=16 << 20)
    assert isinstance(plan, NeuronPlan)
    assert np.array_equal(hidden[plan.order], np.arange(512))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ffn_gate_inp.weight": (4, 32)}, "plain"),
        ({"ffn_up.bias": (60,)}, "plain"),
        ({"ffn_up.weight": (61, 32)}, "alike"),
        ({}, "take"),
    ],
)
def test_layers_whose_neurons_stay_say_why(
    changes: dict[str, tuple[int, ...]], reason: str
) -> None:
    a = ffn(60, 32)
    b = a | {f"blk.0.{stem}": np.zeros(shape, np.float32) for stem, shape in changes.items()}
    (found,) = match_neurons(ArraySource(a), ArraySource(b), memory=50_000)
    assert isinstance(found, Skipped)
    assert reason in found.reason
