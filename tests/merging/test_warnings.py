"""What is probably not meant is said before the work, not after it."""

from __future__ import annotations

import re
import shutil
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgemerge.merging.run import merge
from edgemerge.recipe.recipe import make_recipe
from tests.support.fixtures import unpacked
from tests.support.small_models import edit_hub

Float32 = NDArray[np.float32]

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
    changed = edit_hub(INPUTS / "base", tmp_path / "x", lambda name, w: w * (1 + ("proj" in name)))
    assert warnings(tmp_path, "task_arithmetic", [changed], INPUTS / "base") == []


def noise(name: str, size: float, w: Float32) -> Float32:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return w + np.float32(size) * w.std() * rng.standard_normal(w.shape).astype(np.float32)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_an_expert_of_another_base(method: str, tmp_path: Path) -> None:
    other = edit_hub(INPUTS / "base", tmp_path / "x", lambda _, w: w[::-1])
    base = INPUTS / "base" if method == "task_arithmetic" else None
    told = warnings(tmp_path, method, [INPUTS / "a", other], base)
    first = "a" if base is None else "base"
    assert [sentence for sentence in told if f"x has little in common with {first} (" in sentence]
    assert not [sentence for sentence in told if "a has little in common" in sentence]


def test_an_expert_that_is_a_hundred_times_louder(tmp_path: Path) -> None:
    quiet, loud = (
        edit_hub(
            INPUTS / "base",
            tmp_path / name,
            partial(lambda n, w, size: noise(n, size, w), size=size),
        )
        for name, size in (("quiet", 0.005), ("loud", 0.5))
    )
    (sentence,) = warnings(tmp_path, "task_arithmetic", [loud, quiet], INPUTS / "base")
    assert re.fullmatch(
        r"loud is (9\d|1\d\d)(\.\d)? times as loud as quiet \(norm of its change of the base\) and drowns "
        "it; check loud, or give it a smaller weight",
        sentence,
    )
    given = [(str(loud), 0.01), (str(quiet), 1.0)]
    recipe = make_recipe("task_arithmetic", given, base=str(INPUTS / "base"))
    told: list[str] = []
    merge(recipe, tmp_path / "weighted.gguf", warn=told.append)
    assert told == []


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


@pytest.mark.parametrize(
    ("method", "parameters", "told"),
    [
        ("tsv", {"rank": 9}, []),
        ("tsv", {"rank": 100000}, ["rank 100000 counts as 32: no matrix has more directions"]),
        ("resmerge", {"rank": 33}, ["rank 33 counts as 32: no matrix has more directions"]),
        ("ties", {"svc_rank": 33}, []),
        (
            "ties",
            {"svc": True, "svc_rank": 33},
            ["svc_rank 33 counts as 32: no matrix has more directions"],
        ),
    ],
)
def test_a_rank_that_no_matrix_has(
    method: str, parameters: dict[str, Any], told: list[str], tmp_path: Path
) -> None:
    models = [INPUTS / "a", INPUTS / "b"]
    assert warnings(tmp_path, method, models, INPUTS / "base", **parameters) == told
