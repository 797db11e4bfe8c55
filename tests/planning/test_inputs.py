"""What a plan has of each tensor: inputs, weights by filters, directions."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgemerge import load_recipe, make_recipe, plan
from edgemerge.methods.directions import has_directions
from edgemerge.planning.plan import make_plan
from edgemerge.types import ModelInput, Recipe, Rule, Slice, TensorSpec
from tests.support.fake_source import FakeSource, tensor
from tests.support.small_models import wide_tensors, write_gguf


def test_a_filter_for_the_head_holds_where_the_base_ties_it(tmp_path: Path) -> None:
    own = wide_tensors(1)
    tied = {name: x for name, x in own.items() if name != "output.weight"}
    base = write_gguf(tmp_path / "base.gguf", tied)
    expert = write_gguf(tmp_path / "expert.gguf", wide_tensors(2, own))
    rules = [{"filter": "lm_head", "value": 0.0}, {"value": 0.5}]
    recipe = make_recipe(
        "task_arithmetic", [(str(expert), None)], base=str(base), parameters={"weight": rules}
    )
    weights = {job.name: job.experts[0].settings["weight"] for job in plan(recipe).jobs}
    assert (weights["output.weight"], weights["token_embd.weight"]) == (0.0, 0.5)


def test_slices_of_a_karcher_mean_name_all_of_its_models(tmp_path: Path) -> None:
    paths = [write_gguf(tmp_path / f"{i}.gguf", wide_tensors(i)) for i in range(3)]
    sources = "".join(f"  - {{model: {path}, layer_range: [0, 1]}}\n" for path in paths[1:])
    (tmp_path / "recipe.yml").write_text(
        f"merge_method: karcher\nbase_model: {paths[0]}\nslices:\n- sources:\n{sources}"
    )
    jobs = plan(load_recipe(tmp_path / "recipe.yml")).jobs
    assert {len(job.experts) for job in jobs} == {2}


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.int64])
def test_numbers_of_numpy_are_numbers(kind: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", wide_tensors(1))
    recipe = make_recipe("linear", [(str(path), kind(2)), (str(path), kind(1))])
    weights = [one.settings["weight"] for one in plan(recipe).jobs[0].experts]
    assert weights == [2.0, 1.0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blk.0.ffn_up", True),
        ("blk.0.attn_output", True),
        ("per_layer_token_embd", False),
        ("position_embd", False),
        ("token_types", False),
        ("output", False),
    ],
)
def test_tables_of_tokens_have_no_directions(name: str, expected: bool) -> None:
    spec = TensorSpec(f"{name}.weight", (8, 4), "F32", 128)
    tensor = SimpleNamespace(name=spec.name, experts=[SimpleNamespace(spec=spec)])
    assert has_directions(tensor) is expected


def test_a_filter_looks_at_gguf_s_name_where_no_other_is_known() -> None:
    path, more = Path("/m/a"), tensor("blk.0.attn_kv_a_mqa.weight", (256, 256))
    source = FakeSource(path, architecture="deepseek2", extra=[more])
    rules = (Rule(0.9, "attn"), Rule(0.1))
    whole = Slice((ModelInput(path, parameters={"weight": rules}), ModelInput(path)))
    recipe = Recipe(method="linear", base=None, slices=(whole,), defaults={"weight": (Rule(1.0),)})
    jobs = make_plan(recipe, lambda _: source).jobs
    weights = {job.name: job.experts[0].settings["weight"] for job in jobs}
    assert weights[more.name] == weights["blk.0.attn_q.weight"] == 0.9
    assert weights["blk.0.ffn_down.weight"] == weights["blk.0.attn_norm.weight"] == 0.1
