"""Rotations of values: hidden ones are found, and the function stays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgemerge.alignment.heads import align_models
from edgemerge.alignment.records import HeadPlan, Skipped, ValueRotations
from edgemerge.alignment.reordering import find_reordering
from edgemerge.formats import open_model
from tests.support.head_models import (
    ArraySource,
    head_tensors,
    random_order,
    rotate_values,
    shuffle,
)

Float32 = NDArray[np.float32]
N_HEADS, N_KV, LENGTH, N_EMBD = 8, 4, 8, 48
SETTINGS: dict[str, Any] = {"attention_head_count": N_HEADS, "attention_head_count_kv": N_KV}
SETTINGS |= {"attention_key_length": LENGTH, "attention_value_length": LENGTH}
ARENA = 1 << 22


def noisy(
    tensors: Mapping[str, Float32], size: float, rng: np.random.Generator
) -> dict[str, Float32]:
    return {
        k: x + np.float32(size) * rng.standard_normal(x.shape, np.float32)
        for k, x in tensors.items()
    }


def attention(w: Mapping[str, Float32], x: Float32) -> NDArray[np.float64]:
    """Grouped-query attention of llama.cpp with rotary planes of consecutive pairs, in float64."""

    def project(module: str, n: int) -> NDArray[np.float64]:
        weight = w[f"blk.0.{module}.weight"].astype(np.float64)
        bias = w.get(f"blk.0.{module}.bias", np.zeros(len(weight), np.float32))
        return (x @ weight.T + bias).reshape(len(x), n, -1)

    q, k, v = project("attn_q", N_HEADS), project("attn_k", N_KV), project("attn_v", N_KV)
    angles = np.arange(len(x))[:, None] * 100.0 ** (-np.arange(LENGTH // 2) / (LENGTH // 2))
    phase = np.exp(1j * angles)[:, None]

    def rotary(y: NDArray[np.float64]) -> NDArray[np.complex128]:
        return (y[..., ::2] + 1j * y[..., 1::2]) * phase

    turned = rotary(k).repeat(N_HEADS // N_KV, axis=1)
    scores = np.einsum("ihd,jhd->hij", rotary(q), turned.conj()).real / np.sqrt(LENGTH)
    scores[:, np.triu(np.ones((len(x), len(x)), bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    heads = np.einsum("hij,jhd->ihd", weights, v.repeat(N_HEADS // N_KV, axis=1))
    return heads.reshape(len(x), -1) @ w["blk.0.attn_output.weight"].T.astype(np.float64)


def fused(tensors: Mapping[str, Float32]) -> dict[str, Float32]:
    """Put q, k and v into one tensor, and their biases."""
    out = {
        k: x for k, x in tensors.items() if k.split(".")[2] not in ("attn_q", "attn_k", "attn_v")
    }
    for suffix in ("weight", "bias"):
        parts = [tensors.get(f"blk.0.attn_{part}.{suffix}") for part in "qkv"]
        if parts[0] is not None:
            out[f"blk.0.attn_qkv.{suffix}"] = np.concatenate(parts)  # type: ignore[arg-type]
    return out


def aligned(found: HeadPlan, tensors: Mapping[str, Float32], height: int) -> dict[str, Float32]:
    """Read every tensor through its reordering, in blocks of so many rows."""
    out = {}
    for name, x in tensors.items():
        rows = x.reshape(-1, x.shape[-1])
        reordering = find_reordering(found, name, soft=False)
        if reordering is None:
            out[name] = x
            continue
        blocks = []
        for start in range(0, len(rows), height):
            stop = min(start + height, len(rows))
            block = np.empty((stop - start) * rows.shape[1], np.float32)

            def decode(
                first: int, last: int, at: int | None, values: Float32, rows: Float32 = rows
            ) -> None:
                values[:] = rows[first:last].reshape(-1)

            spare = np.empty(height * rows.shape[1], np.float32)
            row = np.empty(rows.shape[1], np.float32)
            reordering.load(start, stop, decode, row, spare, block)
            blocks.append(block.reshape(stop - start, -1))
        out[name] = np.concatenate(blocks).reshape(x.shape)
    return out


def with_biases(rng: np.random.Generator) -> dict[str, Float32]:
    tensors = head_tensors(N_HEADS, N_KV, n_embd=N_EMBD, key=LENGTH, value=LENGTH, seed=11)
    for part, n in (("q", N_HEADS), ("k", N_KV), ("v", N_KV)):
        tensors[f"blk.0.attn_{part}.bias"] = rng.standard_normal(n * LENGTH).astype(np.float32)
    return tensors


def find(
    a: Mapping[str, Float32], b: Mapping[str, Float32], architecture: str = "llama"
) -> HeadPlan:
    sources = [ArraySource(x, architecture=architecture, **SETTINGS) for x in (a, b)]
    (found,) = align_models(*sources, arena_bytes=ARENA, rotates=True)
    assert isinstance(found, HeadPlan)
    return found


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_rotations_are_found_and_change_nothing(noise: float) -> None:
    rng = np.random.default_rng(3)
    a = with_biases(rng)
    hidden = rotate_values(noisy(a, noise, rng), 0, N_HEADS, N_KV, rng)
    b = shuffle(hidden, *random_order(N_HEADS, N_KV, rng))
    found = find(a, b)
    assert isinstance(found.values, ValueRotations)
    assert found.values.identity_cost > 0.6
    assert found.values.cost < (0.1 if noise else 1e-6)
    matrices = found.values.matrices
    assert matrices is not None
    gram = matrices @ matrices.transpose(0, 2, 1)
    np.testing.assert_allclose(gram, np.tile(np.eye(LENGTH), (N_KV, 1, 1)), atol=1e-6)
    restored = aligned(found, b, 5)
    for height in (1, 3, 64):
        again = aligned(found, b, height)
        assert all(np.array_equal(again[name], x) for name, x in restored.items())
    x = rng.standard_normal((7, N_EMBD)).astype(np.float32)
    difference = attention(restored, x) - attention(b, x)
    assert np.abs(difference).max() < 1e-5 * np.abs(attention(b, x)).max()
    distances = [np.linalg.norm(restored[n] - a[n]) / np.linalg.norm(a[n]) for n in a]
    assert max(distances) < (0.45 if noise else 1e-5)


def test_values_in_a_fused_tensor_are_rotated() -> None:
    rng = np.random.default_rng(5)
    a = with_biases(rng)
    b = shuffle(rotate_values(a, 0, N_HEADS, N_KV, rng), *random_order(N_HEADS, N_KV, rng))
    found = find(fused(a), fused(b), "phi3")
    wanted = fused(a)
    for height in (1, 6, 1000):
        for name, x in aligned(found, fused(b), height).items():
            np.testing.assert_allclose(x, wanted[name], atol=2e-5)


def test_heads_that_are_only_permuted_come_back_exactly() -> None:
    rng = np.random.default_rng(6)
    a = with_biases(rng)
    b = shuffle(a, *random_order(N_HEADS, N_KV, rng))
    found = find(a, b)
    assert isinstance(found.values, ValueRotations)
    assert found.values.matrices is None
    assert all(np.array_equal(x, a[name]) for name, x in aligned(found, b, 4).items())


def test_a_group_of_zeros_stays() -> None:
    rng = np.random.default_rng(7)
    a = with_biases(rng)
    b = rotate_values(a, 0, N_HEADS, N_KV, rng)
    for x in (a, b):
        x["blk.0.attn_v.weight"][:LENGTH] = 0.0
        x["blk.0.attn_v.bias"][:LENGTH] = 0.0
        x["blk.0.attn_output.weight"][:, : 2 * LENGTH] = 0.0
    found = find(a, b)
    assert isinstance(found.values, ValueRotations)
    assert found.values.matrices is not None
    assert np.array_equal(found.values.matrices[0], np.eye(LENGTH))


def test_values_of_fine_tunes_stay(models_dir: Path) -> None:
    sources = open_model(models_dir / "base"), open_model(models_dir / "expert-a")
    for found in align_models(*sources, arena_bytes=ARENA, rotates=True):
        assert isinstance(found, HeadPlan)
        assert isinstance(found.values, ValueRotations)
        assert found.values.matrices is None
        assert found.values.cost <= found.values.identity_cost < 0.1


@pytest.mark.parametrize(
    ("changes", "settings", "reason"),
    [
        ({"attn_sub_norm.weight": (N_HEADS * LENGTH,)}, {}, "scaled number by number"),
        ({}, {"attention_clamp_kqv": 8.0}, "clamped"),
    ],
)
def test_layers_whose_values_stay_say_why(
    changes: dict[str, tuple[int, ...]], settings: dict[str, Any], reason: str
) -> None:
    a = head_tensors(N_HEADS, N_KV, n_embd=N_EMBD, key=LENGTH, value=LENGTH)
    a |= {f"blk.0.{stem}": np.ones(shape, np.float32) for stem, shape in changes.items()}
    source = ArraySource(a, **SETTINGS, **settings)
    (found,) = align_models(source, source, arena_bytes=ARENA, rotates=True)
    assert isinstance(found, HeadPlan)
    assert isinstance(found.values, Skipped)
    assert reason in found.values.reason


def test_importances_of_rotated_columns_are_mixed_by_squares() -> None:
    rng = np.random.default_rng(8)
    a = with_biases(rng)
    b = rotate_values(a, 0, N_HEADS, N_KV, rng)
    found = find(a, b)
    assert isinstance(found.values, ValueRotations)
    assert found.values.matrices is not None
    reordering = find_reordering(found, "blk.0.attn_output.weight", soft=False)
    assert reordering is not None
    importances = rng.random(N_HEADS * LENGTH).astype(np.float32)
    out, row = importances.copy(), np.empty(N_HEADS * LENGTH, np.float32)
    reordering.order_importances(row, out)
    squares = found.values.matrices.astype(np.float64) ** 2
    parts = np.split(importances, N_HEADS)
    wanted = [squares[h * N_KV // N_HEADS] @ part for h, part in enumerate(parts)]
    np.testing.assert_allclose(out, np.concatenate(wanted), rtol=1e-5)
