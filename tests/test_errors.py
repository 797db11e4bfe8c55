"""Errors of ours are values: they go from process to process whole."""

from __future__ import annotations

import pickle

import pytest

from edgemerge.errors import (
    BudgetError,
    EdgemergeError,
    FormatError,
    MismatchError,
    OutputError,
    RecipeError,
    RuntimeFailure,
    VerificationError,
)

ERRORS = [
    EdgemergeError("no"),
    RecipeError("no", path="a.yml", field="models"),
    FormatError("no", path="a.gguf", tensor="x"),
    MismatchError("no", tensor="x", shapes=((1,), (2,))),
    BudgetError("no", needed=2, budget=1),
    OutputError("no", path="a.gguf"),
    VerificationError("no", path="a.gguf"),
    RuntimeFailure("no", detail="why"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_can_be_pickled(error: EdgemergeError) -> None:
    error.add_note("a remedy")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), vars(again)) == (str(error), vars(error))
