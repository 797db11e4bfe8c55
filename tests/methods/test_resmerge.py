"""ResMerge: its twin, the authors' figures, examples that need no computing, cuts and refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgemerge.errors import RecipeError
from edgemerge.methods.resmerge import RESMERGE, backbone, head_factor
from edgemerge.methods.table import METHODS
from tests.methods.test_calibration import NAME, changes
from tests.support.memory_stream import MemoryStream, merge_in_memory
from tests.twins import resmerge as twin

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


def merge(
    arrays: list[Float32], rows: int = 1 << 20, tensor: str = NAME, **options: Any
) -> Float32:
    models: list[tuple[Float32, dict[str, Any]]] = [(x, {}) for x in arrays[1:]]
    return merge_in_memory(
        "resmerge", arrays[0], models, options, rows_per_block=rows, tensor=tensor
    )


def noisy(shape: tuple[int, ...], count: int) -> list[Float32]:
    """Changes of clear first directions, and all others there are."""
    rng = np.random.default_rng([*shape, count])
    return [
        x + (0.3 * rng.standard_normal(shape) * (i > 0)).astype(np.float32)
        for i, x in enumerate(changes(shape, count))
    ]


@pytest.mark.parametrize("make", [changes, noisy])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (3, 10, 16), (5, 1), (1, 9)])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_method_equals_its_definition(
    make: Any, shape: tuple[int, ...], rank: int, count: int
) -> None:
    arrays = make(shape, count)
    options: dict[str, Any] = {"rank": float(rank), "rho": 0.5, "lambda": 0.8}
    got = merge(arrays, 7, **options)
    want = twin.resmerge(arrays[0], arrays[1:], rank, 0.8, 0.5)
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


def test_other_matrices_are_shortened_more() -> None:
    arrays = noisy((20, 16), 2)
    got = merge(arrays, tensor="blk.1.ssm_in.weight")
    want = twin.resmerge(arrays[0], arrays[1:], is_known=False)
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()
    assert np.linalg.norm(got) < np.linalg.norm(merge(arrays))


def test_block_height_does_not_show() -> None:
    arrays = noisy((37, 20), 2)
    assert len({merge(arrays, rows, rank=2.0).tobytes() for rows in (37, 1, 8)}) == 1


@pytest.mark.parametrize("tensor", ["token_embd.weight", "output.weight"])
def test_embeddings_and_vectors_are_averaged(tensor: str) -> None:
    arrays = changes((12, 8), 2)
    want = (arrays[1] + arrays[2]) / 2
    assert merge(arrays, tensor=tensor) == pytest.approx(want, rel=1e-6)
    vectors = [x[0] for x in arrays]
    assert merge(vectors, tensor="blk.0.attn_norm.weight") == pytest.approx(want[0], rel=1e-6)


def test_experts_equal_to_the_base_leave_it() -> None:
    base = changes((9, 7), 1)[1]
    assert np.array_equal(merge([base, base, base]), base)


def test_residuals_that_contradict_are_averaged_and_heads_too_do_not_count() -> None:
    """Opposite changes: nothing is left of either."""
    base, x = noisy((14, 10), 1)
    assert np.abs(merge([base, x, -x])).max() <= 1e-5


def test_equal_changes_keep_their_residual_and_a_fifth_of_its_norm_as_head() -> None:
    base, x = noisy((14, 10), 1)
    head, residual = twin.split(x.astype(np.float64), 1)
    size = 0.2 * np.linalg.norm(residual) / np.linalg.norm(head)
    assert merge([base, x, x]) == pytest.approx(residual + size * head, abs=1e-4)


def test_a_change_that_is_a_head_alone_counts_for_nothing() -> None:
    x = np.outer(np.arange(1, 8), np.arange(2, 11)).astype(np.float32)
    assert np.array_equal(merge([np.zeros_like(x), x, 2 * x]), np.zeros_like(x))


@pytest.mark.parametrize("is_known", [True, False])
def test_factors_follow_from_grams(is_known: bool) -> None:
    vectors = np.random.default_rng(3).standard_normal((3, 50)) + 0.8
    vectors[2] = 0.0
    factors = backbone(vectors @ vectors.T, is_known=is_known)
    want = twin.consensus([*vectors[:, None]], is_known=is_known)[0]
    assert np.array(factors) @ vectors == pytest.approx(want)
    factor = head_factor(vectors @ vectors.T)
    assert np.linalg.norm(factor * vectors.sum(axis=0)) == pytest.approx(
        twin.agreement([*vectors[:, None]])
    )


@pytest.mark.parametrize(("options", "what"), [({"rank": 0.0}, "rank"), ({"rho": -0.1}, "rho")])
def test_what_makes_no_sense_is_refused(options: dict[str, Any], what: str) -> None:
    x = np.ones((4, 4), np.float32)
    stream = MemoryStream("resmerge", x, [(x, {})], options, 9, 0, NAME)
    with pytest.raises(RecipeError, match=what):
        METHODS["resmerge"].check(stream.job)


def test_a_head_beside_residuals_of_almost_its_size_is_found() -> None:
    """One direction searched alone would end between the first two, of sizes 1 and 0.9."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (60, 40))
    sizes = np.array([1.0, 0.9, *[0.3] * 38])
    x = ((left[:, :40] * sizes) @ right).astype(np.float32)
    got = merge([np.zeros_like(x), x], rho=0.0)
    want = (left[:, 1:40] * sizes[1:]) @ right[1:]
    assert np.abs(got - want).max() <= 0.02 * np.abs(want).max()
    assert RESMERGE.parameters_of(model=False)["rank"].default == 1.0
