"""Kernels are compiled once, in a child, and then no merge compiles anything."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgemerge import warm
from edgemerge.merge import merge, plan
from edgemerge.recipe import make_recipe
from edgemerge.types import Recipe
from tests.head_models import head_tensors, shuffle
from tests.imatrix_files import random_sums, write_old
from tests.small_models import load_gguf, stored, write_gguf


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
    Case("ties", {**HALF, "rescale": True}),
    Case("dare_linear", HALF),
    Case("dare_linear", {**HALF, "rescale": False}, "hard"),
    Case("dare_ties", {**HALF, "rescale": "expectation"}),
    Case("della_linear", {**HALF, "rescale": "expectation"}),
    Case("breadcrumbs", HALF),
    Case("breadcrumbs_ties", {**HALF, "rescale": True}, "soft"),
]


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
    if case.method in ("passthrough", "slerp"):
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


def compiled(cache: Path) -> dict[str, int]:
    """Everything that Numba keeps, and when it was written."""
    found = [path for kind in ("nbi", "nbc") for path in cache.rglob(f"*.{kind}")]
    return {str(path): path.stat().st_mtime_ns for path in found}


# -- what the child leaves behind ------------------------------------------------------------------

MERGE = """
import json, sys
from edgemerge.merge import merge
from edgemerge.recipe import make_recipe
method, models, options, output = json.loads(sys.argv[1])
merge(make_recipe(method, models, **options), output, threads=1)
"""


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.name, marks=[pytest.mark.slow] if c.slow else []) for c in CASES],
)
def test_the_child_compiles_all_that_a_merge_needs(
    case: Case, models: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The merge runs in a fresh process, and there as in a child: it cannot ask for another one."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(cache))
    warm.warm_up(plan(recipe_of(case, models)))
    before = compiled(cache)
    assert before
    assert list(cache.glob("*.warm"))
    monkeypatch.setenv(warm.CHILD, "1")
    request = json.dumps([*request_of(case, models), str(tmp_path / "out.gguf")])
    subprocess.run([sys.executable, "-c", MERGE, request], check=True)
    assert stored(tmp_path / "out.gguf")
    assert {Path(path).name for path, _ in compiled(cache).items() ^ before.items()} == set()


# -- when a child is asked -------------------------------------------------------------------------


class Children:
    """Stands in for `subprocess.run` and remembers what was asked for."""

    def __init__(self, status: int | OSError = 0) -> None:
        self.status = status
        self.requests: list[list[str]] = []

    def __call__(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        self.requests.append(command[command.index("edgemerge.warm_child") + 1 :])
        assert options["env"][warm.CHILD] == "1"
        if isinstance(self.status, OSError):
            raise self.status
        return subprocess.CompletedProcess(command, self.status)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with nothing in it, not even itself."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "fresh"))
    return tmp_path / "fresh"


def test_one_child_and_no_second(
    models: dict[str, list[Path]], fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = Children()
    monkeypatch.setattr(warm.subprocess, "run", children)
    ties = plan(recipe_of(CASES[0], models))
    for _ in range(3):
        warm.warm_up(ties)
    assert children.requests == [["ties", "hard", "off", "F16", "F16", ""]]
    kept = {path.name.split("-", 2)[2] for path in fresh.iterdir()}
    assert kept == {"method-ties.warm", "align-hard.warm", "decode-F16.warm", "encode-F16.warm"}
    # Whatever one stamp is missing for, a child is asked again; what is known is not asked twice.
    for case in (
        Case("ties", HALF, "soft"),
        Case("ties", HALF, "hard", out_type="Q8_0"),
        Case("ties", HALF, "hard", inputs="Q8_0", out_type="Q8_0"),
        Case("linear"),
        Case("linear", neurons=True),
    ):
        n_before = len(children.requests)
        for _ in range(2):
            warm.warm_up(plan(recipe_of(case, models)))
        assert len(children.requests) == n_before + 1
    warm.warm_up(plan(recipe_of(Case("linear", align="soft", inputs="Q8_0"), models)))
    assert len(children.requests) == 6


def test_another_kernel_or_child_needs_another_stamp(
    models: dict[str, list[Path]], fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    children = Children()
    monkeypatch.setattr(warm.subprocess, "run", children)
    ties = plan(recipe_of(CASES[0], models))
    warm.warm_up(ties)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "new.py").write_text("# another kernel")
    monkeypatch.setattr(warm, "_kernels", lambda: tmp_path / "kernels")
    warm._fingerprint.cache_clear()
    warm.warm_up(ties)
    warm._fingerprint.cache_clear()
    assert len(children.requests) == 2


def test_a_copy_needs_no_kernels(
    models: dict[str, list[Path]], fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = Children()
    monkeypatch.setattr(warm.subprocess, "run", children)
    recipe = make_recipe("passthrough", [(str(models["Q8_0"][0]), None)], out_type="keep")
    warm.warm_up(plan(recipe))
    assert not children.requests
    assert not fresh.exists()


def test_a_child_has_no_children(
    models: dict[str, list[Path]], fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = Children()
    monkeypatch.setattr(warm.subprocess, "run", children)
    monkeypatch.setenv(warm.CHILD, "1")
    warm.warm_up(plan(recipe_of(CASES[0], models)))
    assert not children.requests


@pytest.mark.parametrize("status", [1, -9, OSError("no memory for a process")])
def test_a_child_that_fails_is_no_error(
    status: int | OSError,
    models: dict[str, list[Path]],
    tmp_path: Path,
    fresh: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    children = Children(status)
    monkeypatch.setattr(warm.subprocess, "run", children)
    recipe = recipe_of(CASES[0], models)
    merge(recipe, tmp_path / "one.gguf")
    assert not list(tmp_path.rglob("*.warm"))  # so the next merge asks again
    merge(recipe, tmp_path / "two.gguf")
    assert len(children.requests) == 2
    assert stored(tmp_path / "one.gguf") == stored(tmp_path / "two.gguf")


def test_a_cache_that_cannot_be_written_is_no_error(
    models: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file" / "cache"))
    children = Children()
    monkeypatch.setattr(warm.subprocess, "run", children)
    warm.warm_up(plan(recipe_of(CASES[0], models)))
    assert len(children.requests) == 1


def test_a_module_in_the_users_folder_is_not_run(
    models: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody's `tempfile.py` beside the recipe would be imported, and run."""
    (tmp_path / "tempfile.py").write_text("open('ran', 'w').close()\nraise SystemExit(1)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    warm.warm_up(plan(recipe_of(Case("linear"), models)))
    assert not (tmp_path / "ran").exists()
    assert list((tmp_path / "cache").glob("*.warm"))
