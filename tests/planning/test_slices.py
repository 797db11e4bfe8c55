"""Outputs whose layers come from ranges of layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgemerge.errors import RecipeError
from edgemerge.types import ModelInput, Recipe, Rule, Slice
from tests.planning.test_plan import A, B, job, planned, recipe, value
from tests.support.fake_source import FakeSource


def stack(*ranges: tuple[Path, int, int], **parameters: Any) -> Recipe:
    slices = tuple(Slice((ModelInput(path, (a, b)),)) for path, a, b in ranges)
    return replace(
        recipe("passthrough", **parameters),
        slices=slices,
    )


def test_slices_renumber_layers() -> None:
    plan = planned(stack((A, 0, 2), (B, 1, 2)))
    origins = {
        j.out.name: (plan.models[j.experts[0].model], j.experts[0].spec.name) for j in plan.jobs
    }
    assert value(plan, "llama.block_count") == 3
    assert origins["blk.1.attn_q.weight"] == (A, "blk.1.attn_q.weight")
    assert origins["blk.2.attn_q.weight"] == (B, "blk.1.attn_q.weight")
    assert origins["token_embd.weight"] == (A, "token_embd.weight")
    assert origins["output_norm.weight"] == (B, "output_norm.weight")
    assert all(j.is_byte_copy for j in plan.jobs)


def test_a_scale_is_arithmetic_and_only_where_it_is_asked_for() -> None:
    rules = (Rule(0.5, "q_proj"), Rule(1.0))
    plan = planned(replace(stack((A, 0, 2)), parameters={"scale": rules}))
    assert not job(plan, "blk.0.attn_q.weight").is_byte_copy
    assert job(plan, "blk.0.attn_k.weight").is_byte_copy


def test_a_range_beyond_the_model_is_refused() -> None:
    with pytest.raises(RecipeError) as caught:
        planned(stack((A, 0, 3)))
    assert str(caught.value) == "layer_range [0, 3] goes past the 2 layers of /m/a"


def with_windows(path: Path, *windows: bool) -> FakeSource:
    key = "llama.attention.sliding_window_pattern"
    return FakeSource(path, metadata={key: (list(windows), "[bool]")})


@pytest.mark.parametrize(
    ("ranges", "sources"),
    [
        ([(A, 0, 2), (A, 0, 1)], [with_windows(A, True, True)]),
        ([(A, 1, 2), (A, 0, 1)], [with_windows(A, True, False)]),
        ([(A, 0, 1), (A, 0, 1)], [with_windows(A, True, False)]),
        ([(A, 0, 1), (B, 0, 1)], [with_windows(A, True, False), with_windows(B, True, False)]),
        ([(A, 0, 1), (B, 0, 1)], [with_windows(A, True, False)]),
    ],
)
def test_slices_that_move_layers_with_settings_of_their_own_are_refused(
    ranges: list[tuple[Path, int, int]], sources: list[FakeSource]
) -> None:
    """Fault: as many layers in another order kept the settings in the old one."""
    with pytest.raises(RecipeError, match="settings per layer, which slices cannot re-order"):
        planned(stack(*ranges), *sources)


@pytest.mark.parametrize(
    ("ranges", "sources"),
    [
        ([(A, 0, 1), (A, 1, 2)], [with_windows(A, True, False)]),
        ([(A, 1, 2), (A, 0, 1)], [with_windows(A, True, True)]),
        ([(A, 0, 1), (B, 0, 1)], [with_windows(A, True, False), with_windows(B, False, True)]),
    ],
)
def test_slices_that_find_the_settings_they_had_are_merged(
    ranges: list[tuple[Path, int, int]], sources: list[FakeSource]
) -> None:
    plan = planned(stack(*ranges), *sources)
    key = "llama.attention.sliding_window_pattern"
    assert plan.metadata[key] == sources[0].metadata()[key]
