"""Methods made of singular directions against their twins, examples that need no computing, and cuts."""

from __future__ import annotations

import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgemerge.errors import RecipeError
from edgemerge.methods.directions import Directions
from edgemerge.methods.shared_tensor import ThreadGroup
from edgemerge.methods.table import METHODS
from tests.methods.test_calibration import NAME, changes
from tests.support.memory_stream import MemoryStream, merge_in_memory
from tests.twins import singular

Float32 = NDArray[np.float32]
WEIGHTS = (0.9, 0.6, 1.0)


def merge(method: str, arrays: list[Float32], rows: int = 1 << 20, **options: Any) -> Float32:
    models = [(x, {"weight": w}) for x, w in zip(arrays[1:], WEIGHTS, strict=False)]
    return merge_in_memory(method, arrays[0], models, options, rows_per_block=rows, tensor=NAME)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (3, 10, 16)])
@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("method", singular.TWINS)
def test_method_equals_its_definition(
    method: str, shape: tuple[int, ...], rank: int, count: int
) -> None:
    arrays = changes(shape, count)
    got = merge(method, arrays, 7, rank=float(rank), **{"lambda": 0.8})
    want = singular.TWINS[method](arrays[0], arrays[1:], WEIGHTS[:count], rank, 0.8)
    assert np.abs(got - want).max() <= 2e-3 * np.abs(want).max()


@pytest.mark.parametrize("method", singular.TWINS)
def test_block_height_does_not_show(method: str) -> None:
    arrays = changes((37, 20), 2)
    results = {merge(method, arrays, rows, rank=5.0).tobytes() for rows in (37, 1, 8)}
    assert len(results) == 1


@pytest.mark.parametrize("method", singular.TWINS)
def test_vectors_are_averaged_and_embeddings_added(method: str) -> None:
    base, first, second = changes((12, 8), 2)
    models = [first, second]
    given = [(x, {"weight": 1.0}) for x in models]
    added = merge_in_memory(method, base, given, tensor="token_embd.weight")
    assert added == pytest.approx(models[0] + models[1], rel=1e-6)
    given = [(x[0], {"weight": 1.0}) for x in models]
    mean = merge_in_memory(method, base[0], given, tensor="blk.0.attn_norm.weight")
    assert mean == pytest.approx((models[0][0] + models[1][0]) / 2, rel=1e-6)


@pytest.mark.parametrize("method", singular.TWINS)
def test_experts_equal_to_the_base_leave_it(method: str) -> None:
    base = changes((9, 7), 1)[1]
    assert np.array_equal(merge(method, [base, base, base]), base)


def test_tsv_of_directions_that_are_orthogonal_is_their_sum() -> None:
    x, y = np.zeros((2, 16, 16), np.float32)
    x[:8, :8] = np.random.default_rng(0).standard_normal((8, 8)) + 8 * np.eye(8)
    y[8:, 8:] = np.random.default_rng(1).standard_normal((8, 8)) + 8 * np.eye(8)
    models: list[tuple[Float32, dict[str, Any]]] = [(x, {}), (y, {})]
    merged = merge_in_memory("tsv", np.zeros_like(x), models, {"rank": 8.0}, tensor=NAME)
    assert merged == pytest.approx(x + y, abs=1e-3)


def test_tsv_counts_one_direction_once() -> None:
    x = np.outer(np.arange(1, 8), np.arange(2, 11)).astype(np.float32)
    models: list[tuple[Float32, dict[str, Any]]] = [(x, {}), (x, {})]
    merged = merge_in_memory("tsv", np.zeros_like(x), models, {"rank": 3.0}, tensor=NAME)
    assert merged == pytest.approx(x, rel=1e-4)


@pytest.mark.parametrize("rank", [1.0, 3.0])
def test_iso_cts_without_room_for_directions_in_common_is_refused(rank: float) -> None:
    base, *experts = changes((12, 8), 3)
    models: list[tuple[Float32, dict[str, Any]]] = [(x, {}) for x in experts]

    def check(method: str, rank: float) -> None:
        METHODS[method].check(MemoryStream(method, base, models, {"rank": rank}, 9, 0, NAME).job)

    with pytest.raises(
        RecipeError, match=r"iso_cts takes a rank above its 3 experts.*rank: 4"
    ) as error:
        check("iso_cts", rank)
    assert error.value.field == "rank"
    check("iso_cts", 4.0)
    check("iso_cts", 0.0)  # which only adds, as for the others
    check("iso_c", rank)


@pytest.mark.parametrize("method", [*singular.TWINS, "resmerge", "task_arithmetic svc", "tsv svc"])
def test_several_workers_make_the_bytes_of_one(method: str) -> None:
    name, _, svc = method.partition(" ")
    base, *experts = changes((37, 20), 2)
    models = [(x, {"weight": 0.7} if name != "resmerge" else {}) for x in experts]
    options = {"svc": True} if svc else {}

    def run(n_workers: int) -> bytes:
        streams = [MemoryStream(name, base, models, options, 8, 0, NAME) for _ in range(n_workers)]
        group = ThreadGroup(n_workers, streams[0].job.n_blocks)
        for stream in streams:
            stream.group = group.join()

        def work(stream: MemoryStream) -> dict[int, bytes]:
            try:
                return {b.number: x.tobytes() for b, x in METHODS[name].blocks(stream)}
            except BaseException:
                group.abort()  # the others would wait for this one, and the pool for them
                raise

        with ThreadPoolExecutor(n_workers) as pool:
            done = [pool.submit(work, stream) for stream in streams]
            made = {number: x for one in done for number, x in one.result(30).items()}
        return b"".join(made[number] for number in sorted(made))

    assert run(1) == run(3) == run(6)


def test_what_is_large_lies_in_the_arena() -> None:
    base, expert = changes((64, 4096), 1)
    stream = MemoryStream("iso_c", base, [(expert, {})], {}, 1, 0, NAME)
    directions = Directions(stream, [64])
    tracemalloc.start()
    try:
        directions.find(lambda block: block.experts)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < directions.vectors.nbytes / 2
