from __future__ import annotations

import pytest

from edgemerge.recipe.parameters import look_up
from edgemerge.types import Parameters, Rule

Q = "model.layers.0.self_attn.q_proj.weight".__contains__
DOWN = "model.layers.1.mlp.down_proj.weight".__contains__
NORM = "model.norm.weight".__contains__


def rules(*pairs: tuple[float | tuple[float, ...], str | None]) -> Parameters:
    return {"t": tuple(Rule(value, name) for value, name in pairs)}


def test_the_first_rule_that_fits_wins() -> None:
    levels = [rules((0.1, "self_attn"), (0.2, "mlp"), (0.3, None))]
    assert look_up("t", levels, Q, 0.0) == 0.1
    assert look_up("t", levels, DOWN, 0.0) == 0.2
    assert look_up("t", levels, NORM, 0.0) == 0.3
    assert look_up("t", [rules((0.3, None), (0.1, "self_attn"))], Q, 0.0) == 0.3


def test_without_a_filter_that_fits_there_is_no_value() -> None:
    assert look_up("t", [rules((0.5, "q_proj"))], Q, 0.0) == 0.5
    assert look_up("t", [rules((0.5, "k_proj"))], Q, 0.0) is None


def test_the_most_specific_level_with_a_rule_wins() -> None:
    model, whole = rules((0.1, "mlp")), rules((0.9, None))
    assert look_up("t", [model, whole], DOWN, 0.0) == 0.1
    assert look_up("t", [model, whole], Q, 0.0) == 0.9
    assert look_up("weight", [model, whole], Q, 0.0) is None


@pytest.mark.parametrize(
    ("gradient", "position", "value"),
    [
        ((0.0, 1.0), 0.0, 0.0),
        ((0.0, 1.0), 0.25, 0.25),
        ((0.0, 1.0), 1.0, 1.0),
        ((0.0, 0.5, 0.3, 0.7, 1.0), 0.5, 0.3),
        ((0.0, 0.5, 0.3, 0.7, 1.0), 0.875, 0.85),
        ((0.4,), 0.7, 0.4),
    ],
)
def test_gradients_interpolate(gradient: tuple[float, ...], position: float, value: float) -> None:
    assert look_up("t", [rules((gradient, None))], Q, position) == pytest.approx(value)
