"""Settings without effect are noted, and those that would undo a method refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgemerge.errors import RecipeError
from edgemerge.formats import open_model
from edgemerge.methods.table import METHODS
from edgemerge.planning.settings import idle_filters, unused_settings
from edgemerge.types import ModelInput, Recipe, Rule, Slice
from tests.support.architecture_models import ARCHITECTURES

IDLE = "svc_rank has no effect without svc: true"


def notes(method: str, **parameters: Any) -> list[str]:
    rules = {key: (Rule(value),) for key, value in parameters.items()}
    own = Slice((ModelInput(Path("a")), ModelInput(Path("b"))))
    return unused_settings(Recipe(method, Path("base"), (own,), rules), METHODS[method])


@pytest.mark.parametrize("method", ["task_arithmetic", "hierarchical", "sce", "tsv"])
def test_a_rank_without_its_switch_is_noted(method: str) -> None:
    assert notes(method, svc_rank=4.0) == [IDLE]
    assert notes(method, svc_rank=4.0, svc=False) == [IDLE]
    assert notes(method, svc_rank=4.0, svc=(False, False)) == [IDLE]
    assert notes(method, svc_rank=4.0, svc=True) == []
    assert notes(method, svc_rank=4.0, svc=(False, True)) == []
    assert notes(method, svc=True) == []


def test_a_switch_of_a_slice_or_for_some_tensors_counts() -> None:
    rank = {"svc_rank": (Rule(4.0),)}
    part = Slice((ModelInput(Path("a")),), {"svc": (Rule(True, "mlp"), Rule(False))})
    recipe = Recipe("ties", Path("base"), (part,), rank)
    assert unused_settings(recipe, METHODS["ties"]) == []


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
def test_equal_singular_values_are_not_calibrated(method: str) -> None:
    with pytest.raises(RecipeError, match=f"values that {method} makes equal, and undo it; leave"):
        notes(method, svc=True)
    assert notes(method, svc=False) == [f"{method} does not use the parameter svc"]


def test_other_methods_do_not_use_it() -> None:
    assert notes("resmerge", svc=True) == ["resmerge does not use the parameter svc"]


def test_a_filter_that_finds_no_tensor_is_noted() -> None:
    base = open_model(ARCHITECTURES / "llama")
    own = Slice((ModelInput(Path("a"), parameters={"weight": (Rule(0.5, "mpl"), Rule(1.0))}),))
    good = {"lambda": (Rule(0.5, "self_attn"), Rule(0.5, "ffn_down"), Rule(1.0))}
    found = idle_filters(Recipe("ties", Path("base"), (own,), good), [base])
    base.close()
    assert found == ["no tensor has 'mpl' in its name, so that this filter of weight has no effect"]
