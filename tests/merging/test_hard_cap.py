"""Under a hard cap of the kernel: a budget that fits is kept, one that cannot work is refused before.

`edgemerge` promises for its process; these tests give it exactly that much, and the kernel kills what
takes more.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from edgemerge.errors import BudgetError
from edgemerge.merging.run import merge, plan
from edgemerge.recipe.recipe import make_recipe
from edgemerge.types import Recipe
from tests.support.memory_group import MemoryGroup
from tests.support.small_models import write_gguf

MIB = 1 << 20
# Page tables, stacks of the kernel and pages of the output on their way to disk are charged to the group.
KERNEL_BYTES = 8 * MIB
COMMAND = [sys.executable, "-m", "edgemerge", "merge", "--type", "Q8_0", "--threads", "1", "--json"]
METHODS = {"linear": {}, "ties": {"density": 0.7}, "della": {"density": 0.7}, "slerp": {"t": 0.3}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A base and two others of 48 MiB, so that a merge that keeps a model in memory is killed."""
    folder = tmp_path_factory.mktemp("models")
    paths = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        tensors = {
            f"{stem}.weight": rng.standard_normal(shape, dtype=np.float32)
            for stem, shape in {
                "token_embd": (8192, 512),
                "output": (8192, 512),
                "output_norm": (512,),
                **{f"blk.{i}.ffn_up": (2048, 512) for i in range(4)},
            }.items()
        }
        paths.append(str(write_gguf(folder / f"{seed}.gguf", tensors, n_layers=4)))
    return paths


def flags(method: str, models: list[str]) -> list[str]:
    base, *experts = models[:2] if method == "slerp" else models
    words = ["-m", method, *([] if method == "linear" else ["--base", base]), *experts]
    for name, value in METHODS[method].items():
        words += ["-P", f"{name}={value}"]
    return words


def recipe_of(method: str, models: list[str]) -> Recipe:
    base, *experts = models[:2] if method == "slerp" else models
    return make_recipe(
        method,
        [(path, None) for path in experts],
        base=None if method == "linear" else base,
        parameters=METHODS[method],
        out_type="Q8_0",
    )


def smallest_budget(recipe: Recipe) -> int:
    """Bytes, as the refusal of a smaller one says."""
    with pytest.raises(BudgetError) as caught:
        plan(recipe, memory=1 * MIB, threads=1)
    return caught.value.needed


@pytest.mark.parametrize("method", METHODS)
def test_the_smallest_budget_is_enough(method: str, models: list[str], tmp_path: Path) -> None:
    recipe = recipe_of(method, models)
    warm = merge(recipe, tmp_path / "warm.gguf", threads=1)  # kernels are compiled now, outside
    budget = smallest_budget(recipe)
    # Where the temporary folder is in memory, the output's pages cannot be given back.
    with MemoryGroup(budget + KERNEL_BYTES + warm.out_bytes) as group:
        target: list[str | Path] = ["-o", tmp_path / "out.gguf", "--memory", str(budget)]
        done = group.run([*COMMAND, *flags(method, models), *target])
        assert group.kills() == 0
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["sha256"] == warm.sha256
    assert report["peak_rss_bytes"] <= budget


def test_a_budget_that_cannot_work_is_refused_before_any_work(
    models: list[str], tmp_path: Path
) -> None:
    budget = smallest_budget(recipe_of("ties", models))
    output = tmp_path / "out.gguf"
    with MemoryGroup(budget + KERNEL_BYTES) as group:
        words: list[str | Path] = [*COMMAND, *flags("ties", models), "-o", output]
        done = group.run([*words, "--memory", str(budget - MIB)])
        assert group.kills() == 0
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert f"the smallest that works is --memory {budget // MIB}MiB" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_budget_beyond_what_there_is_is_told_up_front(models: list[str], tmp_path: Path) -> None:
    """The merge goes on: memory that others use now may be free when it is needed."""
    recipe = recipe_of("linear", models)
    merge(recipe, tmp_path / "warm.gguf", threads=1)
    with MemoryGroup(smallest_budget(recipe) + 64 * MIB) as group:
        words: list[str | Path] = [*COMMAND, *flags("linear", models), "-o", tmp_path / "out.gguf"]
        done = group.run([*words, "--memory", "8G"])
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("note: the budget of 8 GiB is more than the ")
    assert done.stderr.count("budget") == 1
