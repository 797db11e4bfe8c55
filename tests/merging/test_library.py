"""Merging from a program: in a process that holds memory of its own, whose BLAS has many threads."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgemerge import budget
from edgemerge.machine.process import ProcessMemory
from tests.support.fixtures import unpacked
from tests.support.places import ROOT

MIB = 1 << 20
INPUTS = unpacked("golden") / "inputs_f32"

# A program that holds so many MiB. Where 256 MiB are too few, it merges with what the error names.
PROGRAM = """
import json, sys
import numpy as np
from edgemerge import make_recipe, merge, plan
from edgemerge.errors import BudgetError

held_mib, base, a, b, output = sys.argv[1:]
held = np.ones(int(held_mib) << 20, np.uint8)
recipe = make_recipe("ties", [(a, None), (b, None)], base=base, parameters={"density": 0.5})
errors = []
memory = 256 << 20
try:
    plan(recipe, memory=memory)
except BudgetError as error:
    errors.append(str(error))
try:
    report = merge(recipe, output, memory=memory)
except BudgetError as error:
    errors.append(str(error))
    memory = error.needed
    report = merge(recipe, output, memory=memory)
print(json.dumps({"errors": errors, "budget": memory, "peak": report.peak_rss_bytes}))
"""


def run(held_mib: int, folder: Path) -> dict[str, Any]:
    models = [INPUTS / name for name in ("base", "a", "b")]
    command = [sys.executable, "-c", PROGRAM, held_mib, *models, folder / "out.gguf"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_budget_counts_what_the_process_holds_already(tmp_path: Path) -> None:
    found = run(400, tmp_path)
    assert len(found["errors"]) == 2  # of the plan, and of the merge
    for sentence in found["errors"]:
        assert sentence.startswith(
            "a budget of 256 MiB is too small for this merge, as this process holds 4"
        )
    assert sentence.endswith(f"the smallest that works is --memory {found['budget'] // MIB}MiB")
    assert 400 * MIB < found["peak"] <= found["budget"]


def test_a_process_that_holds_less_than_the_budget_keeps_it(tmp_path: Path) -> None:
    found = run(100, tmp_path)
    assert found["errors"] == []
    assert 100 * MIB < found["peak"] <= found["budget"] == 256 * MIB


@pytest.mark.parametrize(
    ("resident", "floor"),
    [(40, budget.FLOOR_BYTES), (64, budget.FLOOR_BYTES), (1000, 1000 * MIB + budget.GROWTH_BYTES)],
)
def test_a_fresh_process_is_always_counted_alike(
    resident: int, floor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = ProcessMemory(rss=resident * MIB, peak=0, file=0)
    monkeypatch.setattr(budget, "read_process", lambda: memory)
    assert budget.floor_bytes() == floor


# -- BLAS ----------------------------------------------------------------------------------------

EXTRACTING = (
    "low_rank.py"  # no part of a merge: decomposes small float64 matrices, which has no kernel
)
PRODUCTS = {"dot", "vdot", "inner", "matmul", "tensordot", "einsum", "linalg"}


def products(path: Path) -> Iterator[str]:
    """Where a file may call BLAS, but for what is no part of a merge."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        is_product = isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult)
        if isinstance(node, ast.expr) and (
            is_product or (isinstance(node, ast.Attribute) and node.attr in PRODUCTS)
        ):
            yield f"{path.name}:{node.lineno}"


def test_a_merge_asks_blas_for_nothing() -> None:
    """How BLAS rounds depends on its threads and on the processor, and its threads spin beside ours."""
    wings = ("alignment", "formats", "merging", "methods", "output", "planning", "recipe")
    files = [path for wing in wings for path in sorted((ROOT / "edgemerge" / wing).rglob("*.py"))]
    files = [path for path in files if path.name != EXTRACTING]
    assert [where for path in files for where in products(path)] == []
