"""A merge reads its inputs as often as its plan says."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgemerge import merge
from edgemerge.merging.run import plan
from edgemerge.recipe.recipe import make_recipe
from tests.support.crashing import write_models


@pytest.mark.parametrize("method", ["ties", "breadcrumbs_ties", "dare_ties", "della"])
def test_where_nothing_is_pruned_nothing_is_surveyed(method: str, tmp_path: Path) -> None:
    models = write_models(tmp_path)
    recipe = make_recipe(
        method,
        [(models["a"], None), (models["b"], None)],
        base=models["base"],
        parameters={"density": 1.0},
        out_type="F32",
    )
    report = merge(recipe, tmp_path / "out.gguf", threads=1)
    assert report.read_bytes == plan(recipe, threads=1).read_bytes
