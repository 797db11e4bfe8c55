"""A merge's kernels are compiled before its work, all at once, and none while it works."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgemerge.formats.quants.codec import CODECS
from edgemerge.formats.quants.weighted import WEIGHTED_TYPES
from edgemerge.merging import precompile as precompiling
from edgemerge.merging.run import merge, plan
from edgemerge.methods.table import METHODS
from edgemerge.native.signatures import SIGNATURES
from edgemerge.recipe.recipe import make_recipe
from edgemerge.types import Recipe
from tests.support.head_models import head_tensors, shuffle
from tests.support.imatrix_files import random_sums, write_old
from tests.support.small_models import load_gguf, stored, write_gguf


@dataclass(frozen=True)
class Case:
    """A merge, and whether it is among those that every run of the tests tries."""

    method: str
    parameters: dict[str, Any] = field(default_factory=dict)
    align: str | None = None
    out_type: str = "F16"
    inputs: str = "F16"
    neurons: bool = False
    imatrix: bool = False
    slow: bool = True

    @property
    def name(self) -> str:
        words = [self.method, *map(str, self.parameters.values()), self.align, self.inputs]
        words += ["neurons"] if self.neurons else []
        words += ["imatrix"] if self.imatrix else []
        return "-".join([word for word in words if word] + [self.out_type])


HALF = {"density": 0.5}
CASES = [
    Case("ties", HALF, "hard", slow=False),
    Case("della", {**HALF, "epsilon": 0.1}, slow=False),
    Case("slerp", {"t": 0.3}, inputs="Q8_0", slow=False),
    Case("linear", align="soft", slow=False),
    Case("passthrough", out_type="Q8_0", slow=False),
    Case("passthrough", out_type="Q4_0", imatrix=True, slow=False),
    Case("passthrough", out_type="Q4_K_M", imatrix=True),
    Case("passthrough", {"scale": 0.5}, inputs="Q8_0"),
    Case("hierarchical", {"scope": "row"}, slow=False),
    Case("hierarchical", {"scope": "block"}, "soft", out_type="Q4_K_M", inputs="Q8_0"),
    Case("hierarchical", align="off"),
    Case("linear"),
    Case("linear", neurons=True),
    Case("slerp", {"t": 0.3}, "hard", neurons=True),
    Case("task_arithmetic"),
    Case("task_arithmetic", {"svc": True}),
    Case("tsv", {"svc": True}),
    Case("sce", {"svc": True}),
    Case("hierarchical", {"svc": True, "scope": "row"}),
    Case("resmerge"),
    Case("ties", {**HALF, "rescale": True}),
    Case("dare_linear", HALF),
    Case("dare_linear", {**HALF, "rescale": False}, "hard"),
    Case("dare_ties", {**HALF, "rescale": "expectation"}),
    Case("della_linear", {**HALF, "rescale": "expectation"}),
    Case("breadcrumbs", HALF),
    Case("breadcrumbs_ties", {**HALF, "rescale": True}, "soft"),
    Case("model_stock"),
    Case("model_stock", {"filter_wise": True}),
    Case("nuslerp"),
    Case("nuslerp", {"nuslerp_flatten": False}),
    Case("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    Case("multislerp"),
    Case("karcher"),
    Case("sce", {"select_topk": 0.5}),
    Case("ram"),
    Case("ramplus_tl"),
    Case("arcee_fusion"),
    Case("nearswap", {"t": 0.1}),
]
ONE_EXPERT = ("passthrough", "slerp", "arcee_fusion", "nearswap")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Type -> base and two experts, of which the second has its heads in another order."""
    folder = tmp_path_factory.mktemp("models")
    tensors = head_tensors(4, 2, n_embd=256, key=64, value=64)
    rng = np.random.default_rng(0)
    for module in ("gate", "up", "down"):
        values = rng.standard_normal((256, 256), np.float32)
        tensors[f"blk.0.ffn_{module}.weight"] = values
    noise = {name: rng.standard_normal(x.shape, np.float32) for name, x in tensors.items()}
    tuned = {name: x + noise[name] / np.float32(9) for name, x in tensors.items()}
    moved = shuffle(tuned, [1, 0], [3, 2, 0, 1])
    for module, axis in (("gate", 0), ("up", 0), ("down", 1)):
        name = f"blk.0.ffn_{module}.weight"
        moved[name] = np.roll(moved[name], 7, axis)
    versions = [tensors, tuned, moved]
    made: dict[str, list[Path]] = {"F32": [], "F16": [], "Q8_0": []}
    for i, version in enumerate(versions):
        made["F32"].append(write_gguf(folder / f"{i}.gguf", version))
        for kind in ("F16", "Q8_0"):
            made[kind].append(folder / f"{i}-{kind}.gguf")
            recipe = make_recipe("passthrough", [(str(made["F32"][i]), None)], out_type=kind)
            merge(recipe, made[kind][i])
    return made


def request_of(case: Case, models: dict[str, list[Path]]) -> tuple[str, Any, dict[str, Any]]:
    """Arguments of `make_recipe`, as JSON knows them."""
    base, *experts = map(str, models[case.inputs])
    if case.method in ONE_EXPERT:
        experts = experts[1:]
    options = {
        "base": None if case.method in ("passthrough", "linear") else base,
        "parameters": case.parameters,
        "out_type": case.out_type,
        "align": case.align,
        "neurons": case.neurons,
    }
    if case.imatrix:
        path = models["F32"][0].with_name("imatrix.dat")
        tensors = load_gguf(models["F32"][0])
        write_old(path, random_sums({name: x.shape for name, x in tensors.items()}))
        options["imatrix"] = str(path)
    return case.method, [(expert, None) for expert in experts], options


def recipe_of(case: Case, models: dict[str, list[Path]]) -> Recipe:
    method, experts, options = request_of(case, models)
    return make_recipe(method, experts, **options)


def images(cache: Path) -> set[str]:
    """Kernels that are compiled."""
    return {path.name for path in cache.glob("native-*/*.image")}


MERGE = """
import json, sys
from edgemerge.merging.run import merge
from edgemerge.recipe.recipe import make_recipe
method, models, options, output = json.loads(sys.argv[1])
merge(make_recipe(method, models, **options), output, threads=1)
print(sorted({name.split(".")[0] for name in sys.modules} & {"numba", "llvmlite"}))
"""


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.name, marks=[pytest.mark.slow] if c.slow else []) for c in CASES],
)
def test_a_merge_finds_all_its_kernels(
    case: Case, models: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The merge runs in a fresh process, which compiles nothing and imports no compiler."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(cache))
    precompiling.precompile(plan(recipe_of(case, models)))
    before = images(cache)
    assert before
    request = json.dumps([*request_of(case, models), str(tmp_path / "out.gguf")])
    done = subprocess.run(
        [sys.executable, "-c", MERGE, request], check=True, capture_output=True, text=True
    )
    assert stored(tmp_path / "out.gguf")
    assert images(cache) == before
    assert done.stdout.strip() == "[]"


def test_a_copy_needs_no_kernels(
    models: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "fresh"))
    recipe = make_recipe("passthrough", [(str(models["Q8_0"][0]), None)], out_type="keep")
    precompiling.precompile(plan(recipe))
    assert not (tmp_path / "fresh").exists()


def test_everything_is_known_to_the_doctor() -> None:
    written = {name for name, codec in CODECS.items() if codec.can_encode}
    needed = {
        name
        for method in METHODS
        for name in precompiling.kernels_of(
            method, CODECS, written, WEIGHTED_TYPES, aligns=True, adapts=True
        )
    }
    needed |= {"gram.row_dots"}  # of a calibration alone
    needed |= {"deltas.measure", "deltas.squared_error"}  # which `delta` calls
    needed |= {"importance.add_squares"}  # which `imatrix` calls, no merge
    _, total = precompiling.find_missing_of_all()
    listed = {f"{file}.{name}" for file, kernels in SIGNATURES.items() for name in kernels}
    assert total == len(listed)
    assert needed == listed


def test_steps_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    names = sorted(f"{file}.{name}" for file, kernels in SIGNATURES.items() for name in kernels)
    monkeypatch.setattr(precompiling, "find_missing", lambda _: names[:20])
    monkeypatch.setattr(precompiling, "compile_missing", asked.extend)
    steps: list[tuple[int, int]] = []
    precompiling.precompile_all(lambda done, total: steps.append((done, total)))
    assert asked == names[:20]
    assert steps[0] == (len(names) - 20, len(names))
    assert steps[-1] == (len(names), len(names))
