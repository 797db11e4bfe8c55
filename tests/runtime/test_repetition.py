"""Answers that repeat themselves are told from those that do not."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edgemerge.runtime.repetition import LEAST_TIMES, LEAST_TOKENS, MAX_PERIOD, STRIDE, LoopWatch


def n_until_loop(tokens: list[int]) -> int | None:
    watch = LoopWatch()
    return next((n for n, token in enumerate(tokens, start=1) if watch.push(token)), None)


@given(
    before=st.lists(st.integers(1000, 2000), max_size=600),
    period=st.lists(st.integers(0, 999), min_size=1, max_size=MAX_PERIOD),
)
def test_a_loop_is_noticed_soon(before: list[int], period: list[int]) -> None:
    looped = [*before, *(period * 700)[:700]]
    found = n_until_loop(looped)
    soon = max(LEAST_TOKENS, LEAST_TIMES * len(period)) + STRIDE
    assert found is not None
    assert found <= len(before) + soon


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(2, 40))
def test_what_grows_is_no_loop(line: list[int], n_lines: int) -> None:
    counted = [token for i in range(n_lines) for token in (*line, 1000 + i)]
    if len(line) < LEAST_TOKENS:
        assert n_until_loop(counted) is None


def test_a_short_refrain_is_no_loop() -> None:
    assert n_until_loop([5] * (LEAST_TOKENS - 1)) is None
    assert n_until_loop([5] * 2 * LEAST_TOKENS) is not None
