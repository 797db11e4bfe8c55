"""What is probably not meant is said before the work, not after it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from edgemerge.merging.run import merge
from edgemerge.recipe.recipe import make_recipe
from tests.support.fixtures import unpacked
from tests.support.small_models import edit_hub

INPUTS = unpacked("golden") / "inputs_f32"


def warnings(
    tmp_path: Path, method: str, models: list[Path], base: Path | None = None, **parameters: Any
) -> list[str]:
    told: list[str] = []

    def warn(sentence: str) -> None:
        assert not (tmp_path / "out.gguf").exists()
        told.append(sentence)

    given = [(str(path), None) for path in models]
    recipe = make_recipe(
        method, given, base=None if base is None else str(base), parameters=parameters
    )
    merge(recipe, tmp_path / "out.gguf", warn=warn)
    return told


def test_nothing_is_said_of_a_sound_merge(tmp_path: Path) -> None:
    assert warnings(tmp_path, "ties", [INPUTS / "a", INPUTS / "b"], INPUTS / "base") == []


def test_an_expert_that_equals_the_base(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(INPUTS / "base", tmp_path / "copy"))
    assert warnings(tmp_path, "task_arithmetic", [INPUTS / "a", copy], INPUTS / "base") == [
        "copy has the base's weights wherever they were compared: it changes nothing"
    ]


def test_an_expert_that_changed_one_kind_of_tensor_is_none(tmp_path: Path) -> None:
    changed = edit_hub(INPUTS / "base", tmp_path / "x", lambda name, w: w + ("proj" in name))
    assert warnings(tmp_path, "task_arithmetic", [changed], INPUTS / "base") == []


@pytest.mark.parametrize(
    ("method", "models", "base", "parameters", "sentence"),
    [
        ("linear", ["a", "a"], None, {}, "a is given 2 times, and counts as often"),
        ("linear", ["a"], None, {}, "linear of one model is that model"),
        (
            *("task_arithmetic", ["a"], "base", {"lambda": -0.5}),
            "lambda is -0.5: what the experts have learnt is subtracted",
        ),
    ],
)
def test_a_merge_that_is_hardly_meant(
    method: str,
    models: list[str],
    base: str | None,
    parameters: dict[str, Any],
    sentence: str,
    tmp_path: Path,
) -> None:
    paths = [INPUTS / name for name in models]
    told = warnings(tmp_path, method, paths, None if base is None else INPUTS / base, **parameters)
    assert sentence in told
