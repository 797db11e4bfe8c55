"""What parameters may be, and what an error says of what they may not."""

from __future__ import annotations

import pytest

from edgemerge.errors import RecipeError
from edgemerge.methods.table import METHODS, known_parameters
from edgemerge.types import InputTensor, Setting, TensorJob, TensorSpec


def test_settings_are_brought_to_their_type() -> None:
    given: dict[str, Setting] = {"weight": 1, "normalize": 1.0, "int8_mask": False, "rescale": "l1"}
    checked = {name: known_parameters()[name][0].check(value) for name, value in given.items()}
    assert checked == {"weight": 1.0, "normalize": True, "int8_mask": False, "rescale": "l1"}
    assert [type(value) for value in checked.values()] == [float, bool, bool, str]


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("density", 1.5, "a number from 0 to 1"),
        ("gamma", -0.1, "a number from 0 to 1"),
        ("epsilon", "small", "a number from 0 to 1"),
        ("weight", "one", "a number"),
        ("weight", True, "a number"),
        ("lambda", 1e39, "a number"),
        ("weight", float("nan"), "a number"),
        ("normalize", "yes", "one of true, false"),
        ("normalize", 2.0, "one of true, false"),
        ("rescale", "l2", "one of true, false, l1, expectation"),
        ("max_iter", 2.5, "a whole number from 0"),
        ("max_iter", -1, "a whole number from 0"),
    ],
)
def test_impossible_settings_say_what_is_possible(
    name: str, value: float | str, wanted: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        known_parameters()[name][0].check(value)
    assert str(caught.value) == f"the parameter {name} is {value!r}; it must be {wanted}"
    assert caught.value.field == name


def della(density: float, epsilon: float) -> TensorJob:
    spec = TensorSpec("output.weight", (4, 4), "F32", 64)
    expert = InputTensor(1, spec, {"density": density, "epsilon": epsilon})
    return TensorJob(spec, "della", InputTensor(0, spec), (expert,), {}, 4, 1)


@pytest.mark.parametrize(("density", "epsilon"), [(0.6, 0.4), (0.1, 0.1), (0.5, 0.7)])
def test_della_keeps_its_probabilities_inside_0_and_1(density: float, epsilon: float) -> None:
    with pytest.raises(RecipeError, match=r"must stay inside \(0, 1\)"):
        METHODS["della"].check(della(density, epsilon))


def test_della_at_density_1_prunes_nothing_and_so_has_no_bounds() -> None:
    METHODS["della"].check(della(1.0, 0.15))
