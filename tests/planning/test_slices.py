"""Outputs whose layers come from ranges of layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgemerge.errors import RecipeError
from edgemerge.types import ModelInput, Recipe, Rule, Slice
from tests.planning.test_plan import LINEAR, A, B, job, planned, recipe, value
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
        ([(A, 0, 1), (B, 1, 2)], [with_windows(A, True, False), with_windows(B, True, True)]),
        ([(A, 0, 1), (B, 1, 2)], [with_windows(A, True, False)]),
    ],
)
def test_slices_that_move_layers_with_settings_of_their_own_are_refused(
    ranges: list[tuple[Path, int, int]], sources: list[FakeSource]
) -> None:
    """Fault: as many layers, in another order or of several models, kept the settings of the first."""
    with pytest.raises(RecipeError, match="settings per layer, which slices cannot re-order"):
        planned(stack(*ranges), *sources)


@pytest.mark.parametrize(
    ("ranges", "sources"),
    [
        ([(A, 0, 1), (A, 1, 2)], [with_windows(A, True, False)]),
        ([(A, 1, 2), (A, 0, 1)], [with_windows(A, True, True)]),
        ([(A, 0, 1), (B, 0, 1)], [with_windows(A, True, False), with_windows(B, False, True)]),
        ([(A, 0, 1), (B, 1, 2)], [with_windows(A, True, False), with_windows(B, False, False)]),
    ],
)
def test_slices_that_find_the_settings_they_had_are_merged(
    ranges: list[tuple[Path, int, int]], sources: list[FakeSource]
) -> None:
    plan = planned(stack(*ranges), *sources)
    key = "llama.attention.sliding_window_pattern"
    assert plan.metadata[key] == sources[0].metadata()[key]


def test_the_layers_that_do_not_fit_are_named() -> None:
    sources = [with_windows(A, True, False), with_windows(B, True, True)]
    with pytest.raises(RecipeError) as caught:
        planned(stack((A, 0, 1), (B, 1, 2)), *sources)
    assert str(caught.value) == (
        "/m/a has settings per layer, which slices cannot re-order yet (its layer 1 and layer 1 of /m/b, "
        "which takes that place, differ in llama.attention.sliding_window_pattern); merge whole models"
    )


ONE_RANGE = Slice((ModelInput(A, (0, 2)), ModelInput(B, (0, 2))))


@pytest.mark.parametrize(
    "what",
    [
        LINEAR,
        recipe("linear", B, base=A),
        replace(LINEAR, slices=(ONE_RANGE,)),
        recipe("task_arithmetic", B, base=A),
    ],
)
def test_whole_models_with_other_settings_are_merged_with_a_note(what: Recipe) -> None:
    """Fault: nothing told that a model's windows are not those of the output."""
    plan = planned(what, with_windows(A, True, False), with_windows(B, True, True))
    note = "llama.attention.sliding_window_pattern is not the same in a and b"
    assert [told for told in plan.notes if "pattern" in told] == [note]


def of_kind(architecture: str, n_layers: int = 4, **stated: Any) -> FakeSource:
    metadata = {
        f"{architecture}.attention.{key}": (number, "u32") for key, number in stated.items()
    }
    return FakeSource(A, architecture=architecture, n_layers=n_layers, metadata=metadata)


def notes_on_kinds(source: FakeSource, *ranges: tuple[int, int]) -> list[str]:
    plan = planned(stack(*((A, *limits) for limits in ranges)), source)
    return [note for note in plan.notes if "kind of attention" in note]


def test_layers_whose_kind_follows_from_their_number_get_a_note() -> None:
    """Fault: every second layer of a Gemma 2 got or lost its window without a word."""
    assert notes_on_kinds(of_kind("gemma2"), (1, 2), (0, 1), (2, 4)) == [
        "llama.cpp gives one in 2 layers of gemma2 another kind of attention, by its number, and slices "
        "change the kind of 2 layers (first: layer 0, from layer 1 of a); ranges that shift layers by "
        "multiples of 2 keep it"
    ]
    [note] = notes_on_kinds(of_kind("smollm3"), (0, 2), (3, 4))
    assert "change the kind of 1 layer (first: layer 2, from layer 3 of a)" in note


@pytest.mark.parametrize(
    ("source", "n_notes"),
    [
        (of_kind("gpt-oss", sliding_window=128), 1),
        (of_kind("gemma3", sliding_window=512, sliding_window_pattern=2), 1),
        (of_kind("gemma3", sliding_window=512), 0),  # neither is the sixth
        (of_kind("olmo2"), 0),  # has windows in OLMo 3 only
        (of_kind("llama"), 0),
    ],
)
def test_only_models_with_two_kinds_get_that_note(source: FakeSource, n_notes: int) -> None:
    assert len(notes_on_kinds(source, (1, 2), (0, 1), (2, 4))) == n_notes
    assert notes_on_kinds(source, (2, 4), (0, 2)) == []
