"""Inputs and helpers of tests that merge real models whose heads were shuffled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemerge.merging.run import merge
from edgemerge.output.report import MergeReport
from edgemerge.recipe.recipe import make_recipe

Float32 = NDArray[np.float32]

NAMES = ("base", "expert-a", "expert-b", "expert-b-permuted")
MOVED = "attention heads of {} reordered in 4 of 4 layers"

# Every method but passthrough, which has one model and nothing to align.
PARAMETERS: dict[str, dict[str, Any]] = {
    "linear": {},
    "slerp": {"t": 0.3},
    "task_arithmetic": {"lambda": 0.7},
    "ties": {"density": 0.5},
    "dare_linear": {"density": 0.6, "lambda": 0.6},
    "dare_ties": {"density": 0.6},
    "della": {"density": 0.6, "epsilon": 0.1},
    "della_linear": {"density": 0.6, "epsilon": 0.1, "rescale": "expectation"},
    "breadcrumbs": {"density": 0.9, "lambda": 0.7},
    "breadcrumbs_ties": {"density": 0.9, "rescale": True},
    "hierarchical": {},
}


def convert(models_dir: Path, folder: Path, out_type: str) -> dict[str, Path]:
    """The real models as GGUF, by name."""
    made = {name: folder / f"{name}-{out_type}.gguf" for name in NAMES}
    for name, path in made.items():
        recipe = make_recipe("passthrough", [(str(models_dir / name), None)], out_type=out_type)
        merge(recipe, path)
    return made


def combine(
    method: str,
    base: Path,
    experts: Sequence[Path],
    output: Path,
    *,
    run: dict[str, Any] | None = None,
    **options: Any,
) -> MergeReport:
    """Merge with a method; of one that takes one expert, the last counts; `linear` has no base."""
    if method == "slerp":
        experts = experts[-1:]
    recipe = make_recipe(
        method,
        [(str(path), None) for path in experts],
        base=None if method == "linear" else str(base),
        **{"out_type": "F32", **options},
    )
    return merge(recipe, output, force=True, **(run or {}))


def largest_difference(a: dict[str, Float32], b: dict[str, Float32]) -> float:
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)
