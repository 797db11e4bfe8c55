"""Several workers on one tensor: every block once, sums in row order, nobody waits for ever."""

from __future__ import annotations

import functools
import random
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from edgemerge.errors import Stopped
from edgemerge.methods.shared_tensor import GroupThread, ThreadGroup
from edgemerge.types import Float32, Float64

N_BLOCKS, ROWS = 40, 3


@pytest.fixture
def rows() -> Float64:
    """Numbers whose sum depends on the order."""
    rng = np.random.default_rng(0)
    shape = (N_BLOCKS, ROWS, 2)
    return rng.standard_normal(shape) * 10.0 ** rng.integers(-12, 12, shape)


def add_in_order(rows: Float64) -> Float64:
    total = np.zeros(2)
    for row in rows.reshape(-1, 2):
        total += row
    return total


@pytest.mark.parametrize("n_workers", [1, 2, 5])
def test_sums_are_those_of_one_worker(n_workers: int, rows: Float64) -> None:
    group = ThreadGroup(n_workers, N_BLOCKS)

    def work(place: GroupThread) -> tuple[list[int], Float64]:
        taken: list[int] = []
        for _ in range(2):  # passes
            total = place.row_sum((2,))
            for i in place.take_blocks():
                time.sleep(random.random() * 1e-4)
                before = total.add(i, rows[i])
                assert np.array_equal(before, add_in_order(rows[:i]))
                taken.append(i)
            assert np.array_equal(total.total(), add_in_order(rows))
        return taken, total.total()

    with ThreadPoolExecutor(n_workers) as pool:
        done = [pool.submit(work, group.join()) for _ in range(n_workers)]
        taken = [i for future in done for i in future.result()[0]]
    assert sorted(taken) == sorted([*range(N_BLOCKS), *range(N_BLOCKS)])


@pytest.mark.parametrize("n_workers", [1, 3])
def test_a_large_sum_is_that_of_one_worker(n_workers: int, rows: Float64) -> None:
    """It lies in the first worker's memory, who may overwrite it when all have a copy."""
    group = ThreadGroup(n_workers, N_BLOCKS)
    narrow = rows.astype(np.float32)
    want = np.zeros(2, np.float32)
    for row in narrow.reshape(-1, 2):
        want += row

    def work(place: GroupThread) -> None:
        own = np.full(2, np.nan, np.float32)
        total = place.large_sum(own)

        def add(i: int, found: Float32) -> None:
            for row in narrow[i]:
                time.sleep(random.random() * 1e-4)
                found += row

        for i in place.take_blocks():
            total.add_by(i, functools.partial(add, i))
        total.copy_to(own)
        assert np.array_equal(own, want)
        own[:] = np.nan

    with ThreadPoolExecutor(n_workers) as pool:
        for future in [pool.submit(work, group.join()) for _ in range(n_workers)]:
            future.result()


@pytest.mark.parametrize("n_workers", [1, 3])
def test_counts_are_added_up_for_everybody(n_workers: int) -> None:
    group = ThreadGroup(n_workers, N_BLOCKS)

    def work(place: GroupThread) -> list[int]:
        sums = []
        for _ in range(3):
            counts = np.zeros(N_BLOCKS, np.uint32)
            for i in place.take_blocks():
                counts[i] += i
            place.add_counts(counts)
            sums.append(int(counts.sum()))
        return sums

    with ThreadPoolExecutor(n_workers) as pool:
        done = [pool.submit(work, group.join()) for _ in range(n_workers)]
        for future in done:
            assert future.result() == [sum(range(N_BLOCKS))] * 3


@pytest.mark.parametrize(
    "waits_for", ["counts", "turn", "total", "large turn", "large total", "copies"]
)
def test_who_waits_gives_up_when_another_fails(waits_for: str) -> None:
    group = ThreadGroup(2, N_BLOCKS)

    def wait(place: GroupThread) -> None:
        own = np.zeros(1, np.float32)
        if waits_for == "counts":
            place.add_counts(np.zeros(4, np.uint32))
        elif waits_for == "turn":
            place.row_sum((1,)).add(1, np.zeros((1, 1)))
        elif waits_for == "large turn":
            place.large_sum(own).add_by(1, lambda total: None)
        elif waits_for == "large total":
            place.large_sum(own).copy_to(own)
        elif waits_for == "copies":
            total = place.large_sum(own)
            for i in range(N_BLOCKS):
                total.add_by(i, lambda total: None)
            total.copy_to(own)
        else:
            place.row_sum((1,)).total()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(wait, group.join())
        time.sleep(0.02)
        assert not future.done()
        group.abort()
        with pytest.raises(Stopped):
            future.result(timeout=5)


def test_the_last_to_finish_is_told() -> None:
    group = ThreadGroup(2, 1)
    assert [group.join().finish(), group.join().finish()] == [False, True]
