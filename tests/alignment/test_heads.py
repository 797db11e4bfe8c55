"""Hidden permutations of heads are found: in the real models, in every layout, through noise."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from edgemerge.alignment.heads import (
    align_models,
    arena_need,
    column_mix,
    column_order,
    row_mix,
    row_order,
    row_runs,
)
from edgemerge.alignment.records import HeadPlan, Skipped
from edgemerge.errors import BudgetError, FormatError
from edgemerge.formats import open_model
from edgemerge.merging.run import merge
from edgemerge.recipe.recipe import make_recipe
from edgemerge.types import Source
from tests.support.head_models import ArraySource, head_tensors, random_order, shuffle

Float32 = NDArray[np.float32]
ARENA = 64 << 20


def align(reference: Source, other: Source, **options: int) -> list[HeadPlan]:
    """Align every layer; none may be skipped."""
    plans = align_models(reference, other, **{"arena_bytes": ARENA, **options})  # type: ignore[arg-type]
    aligned = [plan for plan in plans if isinstance(plan, HeadPlan)]
    assert aligned == plans
    return aligned


def restored(plan: HeadPlan, tensors: Mapping[str, Float32]) -> dict[str, Float32]:
    """Apply a plan as the merge does."""
    result = {}
    for name, x in tensors.items():
        rows, columns = row_order(plan, name), column_order(plan, name)
        x = x if rows is None else x[rows]
        result[name] = x if columns is None else x[..., columns]
    return result


def inverse(order: list[int]) -> list[int]:
    return np.argsort(order).tolist()


# -- the real models ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def truth(models_dir: Path) -> list[dict[str, list[int]]]:
    stated = json.loads((models_dir / "expert-b-permuted" / "head_permutation.json").read_text())
    layers: list[dict[str, list[int]]] = stated["layers"]
    return layers


@pytest.fixture(scope="module")
def converted(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The permuted expert as GGUF of some types, as `edgemerge convert` makes them."""
    folder = tmp_path_factory.mktemp("converted")
    model = str(models_dir / "expert-b-permuted")
    made = {"hub": models_dir / "expert-b-permuted"}
    for out_type in ("F16", "Q8_0", "Q4_K_M"):
        made[out_type] = folder / f"{out_type}.gguf"
        recipe = make_recipe("passthrough", [(model, None)], out_type=out_type)
        merge(recipe, made[out_type], threads=2)
    return made


@pytest.mark.parametrize("stored", ["hub", "F16", "Q8_0", "Q4_K_M"])
@pytest.mark.parametrize("reference", ["base", "expert-a", "expert-b"])
def test_the_true_permutation_is_found_in_every_layer(
    models_dir: Path,
    converted: dict[str, Path],
    truth: list[dict[str, list[int]]],
    reference: str,
    stored: str,
) -> None:
    plans = align(open_model(models_dir / reference), open_model(converted[stored]))
    assert len(plans) == 4
    for plan, layer in zip(plans, truth, strict=True):
        assert list(plan.heads) == inverse(layer["q_perm"])
        assert list(plan.kv_groups) == inverse(layer["kv_perm"])
        assert plan.cost < 0.15 < 0.9 < plan.identity_cost
        assert plan.gap <= 1e-3 * plan.cost + 1e-12
        assert plan.confidence > 0.999
        assert plan.converged
        assert not plan.exact
        assert plan.distances.argmin(axis=1).tolist() == list(plan.heads)


def test_layouts_give_the_same_plan(models_dir: Path, converted: dict[str, Path]) -> None:
    base = open_model(models_dir / "base")
    hub, file = (align(base, open_model(converted[stored])) for stored in ("hub", "F16"))
    assert hub == file
    for ours, theirs in zip(hub, file, strict=True):
        assert np.array_equal(ours.distances, theirs.distances)


@pytest.mark.parametrize(("a", "b"), [("base", "expert-a"), ("expert-a", "expert-b")])
def test_fine_tunes_of_one_base_stay(models_dir: Path, a: str, b: str) -> None:
    for plan in align(open_model(models_dir / a), open_model(models_dir / b)):
        assert plan.is_identity
        assert not plan.guarded  # identity is the best there is, not merely good enough
        assert plan.cost == pytest.approx(plan.identity_cost)
        assert row_order(plan, f"blk.{plan.layer}.attn_q.weight") is None
        assert column_order(plan, f"blk.{plan.layer}.attn_output.weight") is None


# -- hidden permutations -------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.0, 1.0, 2.0, 4.0])
def test_recovery_through_noise(sigma: float) -> None:
    """32 heads, 8 KV, head 64, width 1024; both copies get noise of sigma times the weights' size."""
    clean = head_tensors(32, 8, n_embd=1024, key=64, value=64, seed=1)
    rng = np.random.default_rng(int(sigma))
    groups, heads = random_order(32, 8, rng)
    noisy = [
        {k: x + np.float32(sigma) * rng.standard_normal(x.shape, np.float32) for k, x in m.items()}
        for m in (clean, shuffle(clean, groups, heads))
    ]
    sources = [ArraySource(m, attention_head_count=32, attention_head_count_kv=8) for m in noisy]
    (plan,) = align(sources[0], sources[1])
    assert list(plan.heads) == inverse(heads)
    assert list(plan.kv_groups) == inverse(groups)


@pytest.mark.parametrize(
    ("n_heads", "n_kv"), [(1, 1), (6, 1), (12, 1), (5, 5), (9, 9), (8, 4), (12, 2)]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_tensor_comes_back(n_heads: int, n_kv: int, seed: int) -> None:
    """One head, MQA, MHA, GQA; with biases, per-head norms and sinks, and heads of unequal lengths."""
    rng = np.random.default_rng([n_heads, n_kv, seed])
    tensors = head_tensors(n_heads, n_kv, key=6, value=10, layers=2, seed=seed)
    for layer in range(2):
        sizes = {
            "attn_q.bias": n_heads * 6,
            "attn_k.bias": n_kv * 6,
            "attn_v.bias": n_kv * 10,
            "attn_output.bias": 48,
            "attn_sinks.weight": n_heads,
            "attn_q_norm.weight": n_heads * 6,
            "attn_k_norm.weight": n_kv * 6,
            "attn_norm.weight": 48,
        }
        for stem, size in sizes.items():
            tensors[f"blk.{layer}.{stem}"] = rng.standard_normal(size).astype(np.float32)
    orders = [random_order(n_heads, n_kv, rng) for _ in range(2)]
    shuffled: dict[str, Any] = {}
    for layer, (groups, heads) in enumerate(orders):
        own = {k: x for k, x in tensors.items() if k.startswith(f"blk.{layer}.")}
        shuffled |= shuffle(own, groups, heads)
    settings: dict[str, Any] = {"attention_head_count": n_heads, "attention_head_count_kv": n_kv}
    plans = align(ArraySource(tensors, **settings), ArraySource(shuffled, **settings))
    r = n_heads // n_kv
    for plan, (groups, heads) in zip(plans, orders, strict=True):
        assert list(plan.heads) == inverse(heads)
        assert list(plan.kv_groups) == inverse(groups)
        assert all(old // r == plan.kv_groups[new // r] for new, old in enumerate(plan.heads))
        assert plan.cost == pytest.approx(0.0, abs=1e-12)
        own = {k: x for k, x in shuffled.items() if k.startswith(f"blk.{plan.layer}.")}
        for name, x in restored(plan, own).items():
            assert np.array_equal(x, tensors[name]), name


def test_biases_tell_heads_apart_where_weights_do_not() -> None:
    ones = {k: np.ones_like(x) for k, x in head_tensors(4, 4).items()}
    for module in ("attn_q", "attn_k", "attn_v"):
        ones[f"blk.0.{module}.bias"] = np.repeat(np.array([10, -20, 30, -40], np.float32), 8)
    moved = shuffle(ones, [2, 0, 3, 1], [2, 0, 3, 1])
    sources = [ArraySource(model, attention_head_count=4) for model in (ones, moved)]
    (plan,) = align(*sources)
    assert list(plan.heads) == inverse([2, 0, 3, 1])


def write_phi3(path: Path, qkv: Float32, o: Float32) -> Path:
    writer = gguf.GGUFWriter(path, "phi3")
    writer.add_block_count(1)
    writer.add_embedding_length(64)
    writer.add_head_count(8)
    writer.add_head_count_kv(4)
    writer.add_tensor("blk.0.attn_qkv.weight", qkv)
    writer.add_tensor("blk.0.attn_output.weight", o)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_fused_qkv_is_taken_apart(tmp_path: Path) -> None:
    tensors = head_tensors(8, 4, n_embd=64, seed=8)
    groups, heads = random_order(8, 4, np.random.default_rng(8))
    written = []
    for name, model in (("a", tensors), ("b", shuffle(tensors, groups, heads))):
        q, k, v, o = model.values()
        qkv = np.concatenate([q, k, v])
        written.append((open_model(write_phi3(tmp_path / f"{name}.gguf", qkv, o)), qkv, o))
    (plan,) = align(written[0][0], written[1][0])
    assert list(plan.heads) == inverse(heads)
    order = row_order(plan, "blk.0.attn_qkv.weight")
    assert order is not None
    assert np.array_equal(written[1][1][order], written[0][1])
    columns = column_order(plan, "blk.0.attn_output.weight")
    assert columns is not None
    assert np.array_equal(written[1][2][:, columns], written[0][2])


# -- invariance and budget ---------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["hub", "Q4_K_M"])
def test_budget_and_threads_do_not_show(
    models_dir: Path, converted: dict[str, Path], stored: str
) -> None:
    base, other = open_model(models_dir / "base"), open_model(converted[stored])
    least, useful = arena_need(base, other)
    assert least < useful
    wanted = align(base, other)
    for arena_bytes in (least, least + 5000, (least + useful) // 2, useful):
        for threads in (1, 3):
            plans = align(base, other, arena_bytes=arena_bytes, threads=threads)
            assert plans == wanted
            for plan, one in zip(plans, wanted, strict=True):
                assert np.array_equal(plan.distances, one.distances)
    with pytest.raises(BudgetError) as caught:
        align(base, other, arena_bytes=least - 1)
    assert caught.value.needed == least


def test_each_row_is_read_once() -> None:
    tensors = head_tensors(4, 2)
    tensors["blk.0.attn_q.bias"] = np.zeros(32, np.float32)
    tensors["blk.0.ffn_up.weight"] = np.zeros((8, 48), np.float32)
    settings: dict[str, Any] = {"attention_head_count": 4, "attention_head_count_kv": 2}
    sources = ArraySource(tensors, **settings), ArraySource(tensors, **settings)
    read: list[int] = []
    least, _ = arena_need(*sources)
    align_models(*sources, arena_bytes=least, on_read=read.append)
    for source in sources:
        rows = sum(stop - start for _, start, stop in source.reads)
        assert rows == 32 + 16 + 16 + 48 + 1
        assert len(set(source.reads)) == len(source.reads)
    assert sum(read) == 2 * sum(x.nbytes for k, x in tensors.items() if "ffn" not in k)


def test_the_seed_draws_another_sketch_and_finds_the_same(models_dir: Path) -> None:
    base, other = (open_model(models_dir / name) for name in ("base", "expert-b-permuted"))
    one, two = align(base, other, seed=0), align(base, other, seed=1)
    assert [plan.heads for plan in one] == [plan.heads for plan in two]
    assert all(a.cost != b.cost for a, b in zip(one, two, strict=True))


def test_layers_can_be_paired_across() -> None:
    tensors = head_tensors(4, 2, layers=3)
    source = ArraySource(tensors, attention_head_count=4, attention_head_count_kv=2)
    swapped = {
        k.replace("blk.0.", "blk.9.").replace("blk.2.", "blk.0."): x for k, x in tensors.items()
    }
    other = ArraySource(swapped, attention_head_count=4, attention_head_count_kv=2)
    pairs = align_models(source, other, arena_bytes=ARENA, layers=[(2, 0), (0, 9), (1, 5)])
    assert isinstance(pairs[0], HeadPlan)
    assert isinstance(pairs[1], HeadPlan)
    assert (pairs[0].layer, pairs[0].reference_layer, pairs[0].cost) == (0, 2, 0.0)
    assert (pairs[1].layer, pairs[1].reference_layer, pairs[1].cost) == (9, 0, 0.0)
    assert pairs[2] == Skipped(5, "only one of the models has the layer")


def test_damaged_weights_are_an_error() -> None:
    tensors = head_tensors(4, 2)
    settings: dict[str, Any] = {"attention_head_count": 4, "attention_head_count_kv": 2}
    good = ArraySource(tensors, **settings)
    for name in tensors:
        bad = ArraySource(tensors, **settings)
        bad.tensors[name][3, 5] = np.nan
        with pytest.raises(FormatError) as caught:
            align(good, bad)
        assert caught.value.tensor == name


# -- indices --------------------------------------------------------------------------------------------


def test_runs_cover_a_block_with_few_reads() -> None:
    tensors = head_tensors(4, 2)
    settings: dict[str, Any] = {"attention_head_count": 4, "attention_head_count_kv": 2}
    moved = shuffle(tensors, [1, 0], [3, 2, 0, 1])
    (plan,) = align(ArraySource(tensors, **settings), ArraySource(moved, **settings))
    name = "blk.0.attn_q.weight"
    order = row_order(plan, name)
    assert order is not None
    for start, stop in ((0, 32), (3, 20), (8, 9), (0, 8), (31, 32), (5, 5)):
        block = np.full((stop - start, 48), np.nan, np.float32)
        runs = row_runs(order, start, stop)
        assert len(runs) <= (stop - start) // 8 + 2
        for at, first, last in runs:
            block[at : at + last - first] = moved[name][first:last]
        assert np.array_equal(block, tensors[name][start:stop])


def test_mixes_are_matrices_over_rows_and_columns() -> None:
    """Heads that differ little, so that the soft plan mixes them."""
    rng = np.random.default_rng(2)
    shared = head_tensors(4, 4, key=3, value=5)
    models = []
    for scale in (0.1, 2.0):
        own = {
            k: scale * rng.standard_normal(x.shape).astype(np.float32) for k, x in shared.items()
        }
        models.append({k: shared[k] + own[k] for k in shared})
    sources = [ArraySource(m, attention_head_count=4) for m in models]
    (plan,) = align(*sources)
    dense = np.zeros((4, 4))
    for i, parts in enumerate(plan.soft_heads):
        for j, weight in parts:
            dense[i, j] = weight
    for name, mix, length in (
        ("blk.0.attn_q.weight", row_mix, 3),
        ("blk.0.attn_v.weight", row_mix, 5),
        ("blk.0.attn_output.weight", column_mix, 5),
    ):
        found = mix(plan, name)
        if plan.is_identity:
            assert found is None
            continue
        assert found is not None
        indptr, indices, weights = found
        matrix = np.zeros((4 * length, 4 * length))
        matrix[np.repeat(np.arange(4 * length), np.diff(indptr)), indices] = weights
        np.testing.assert_allclose(matrix, np.kron(dense, np.eye(length)), atol=1e-7)


def test_layers_that_differ_between_the_models_are_skipped() -> None:
    tensors = head_tensors(4, 2)
    settings: dict[str, Any] = {"attention_head_count": 4, "attention_head_count_kv": 2}
    biased = {**tensors, "blk.0.attn_q.bias": np.zeros(32, np.float32)}
    (found,) = align_models(
        ArraySource(tensors, **settings), ArraySource(biased, **settings), arena_bytes=ARENA
    )
    assert found == Skipped(0, "its tensors are cut differently in the two models")
    strange = ArraySource(tensors, dtype="F64", **settings)
    (found,) = align_models(ArraySource(tensors, **settings), strange, arena_bytes=ARENA)
    assert isinstance(found, Skipped)
    assert "F64" in found.reason
