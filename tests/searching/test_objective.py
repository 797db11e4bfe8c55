from __future__ import annotations

import pytest

from edgemerge.searching.objective import Figures, Objective

START = Figures({"a": 60.0, "b": 50.0, "general": 40.0}, {"text": 10.0}, 1000)


def test_the_score_is_the_weighted_mean_of_tasks() -> None:
    found = Figures({"a": 70.0, "b": 40.0, "general": 0.0}, {"text": 10.0}, 1000)
    assert Objective({"a": 1, "b": 1, "general": 0}, {}).score(found, START) == 55.0
    assert Objective({"a": 3, "b": 1}, {}).score(found, START) == 62.5


def test_a_percent_of_perplexity_or_size_costs_its_weight() -> None:
    found = Figures(START.accuracies, {"text": 10.2}, 1100)
    objective = Objective({"a": 1, "b": 1, "text": 0.5, "size": 0.1}, {})
    assert objective.score(found, START) == pytest.approx(55 - 0.5 * 2 - 0.1 * 10)
    assert objective.score(START, START) == 55


def test_texts_alone_are_enough() -> None:
    found = Figures({}, {"text": 9.0}, 1000)
    assert Objective({"text": 1, "size": 0}, {}).score(found, START) == pytest.approx(10)


def test_what_is_to_be_kept_costs_only_above_its_margin() -> None:
    objective = Objective({"a": 1, "b": 1, "general": 0, "text": 0}, {"general": 2, "text": 1})
    kept = Figures({**START.accuracies, "general": 38.0}, {"text": 10.1}, 1000)
    assert objective.breach(kept, START) == pytest.approx(0)
    assert objective.score(kept, START) == pytest.approx(55)
    lost = Figures({**START.accuracies, "general": 36.0}, {"text": 10.2}, 1000)
    assert objective.breach(lost, START) == pytest.approx(3)
    assert objective.score(lost, START) == pytest.approx(55 - 9)
