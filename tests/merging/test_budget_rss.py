"""The budget holds for the process: peak resident memory of fresh processes, kernels compiled or not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgemerge.errors import BudgetError
from edgemerge.merging.run import plan
from edgemerge.recipe.recipe import make_recipe
from tests.support.adapters import FRONT, Kind, pair, write_adapter
from tests.support.fixtures import unpacked
from tests.support.places import ROOT

MIB = 1 << 20
GOLDEN = unpacked("golden") / "inputs_f32"
SHAPE = ("--shape", "smollm2-135m")


def run_merge(
    arguments: list[str], output: Path, *, cache: Path | None = None
) -> dict[str, int | str]:
    """Run `edgemerge merge --json` in a process of its own."""
    environment = dict(os.environ)
    if cache is not None:
        environment["NUMBA_CACHE_DIR"] = str(cache)
    done = subprocess.run(
        [sys.executable, "-m", "edgemerge", "merge", *arguments, "-o", str(output), "--json"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, int | str] = json.loads(done.stdout)
    return report


@pytest.fixture(scope="module")
def random_models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two experts with the shape of SmolLM2-135M, in bf16."""
    folder = tmp_path_factory.mktemp("smollm2")
    tool = ROOT / "tools" / "make_tiny_model.py"
    base = folder / "base"
    subprocess.run([sys.executable, tool, *SHAPE, "--out", base], check=True, capture_output=True)
    experts = [folder / f"expert-{i}" for i in (1, 2)]
    for i, expert in enumerate(experts, start=1):
        command = [sys.executable, tool, "--noise-of", base, "--seed", str(i), "--out", expert]
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return [base, *experts]


def flags(models: list[Path], method: str) -> list[str]:
    base, *experts = map(str, models)
    pruned = {"ties": "density=0.5", "della": "density=0.5", "sce": "select_topk=0.5"}
    settings = ["-P", pruned[method]] if method in pruned else []
    if method == "arcee_fusion":
        experts = experts[:1]
    return ["-m", method, "--base", base, *experts, "--type", "Q4_K_M", *settings]


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "della", "sce", "arcee_fusion"])
def test_peak_stays_under_the_budget(
    random_models: list[Path], tmp_path: Path, method: str
) -> None:
    hashes = set()
    for memory, threads in ((96, 1), (160, 2), (1024, 2)):
        arguments = [*flags(random_models, method), "--memory", f"{memory}MiB"]
        report = run_merge([*arguments, "--threads", str(threads)], tmp_path / f"{memory}.gguf")
        assert report["budget_bytes"] == memory * MIB
        assert int(report["peak_rss_bytes"]) <= memory * MIB
        hashes.add(report["sha256"])
    assert len(hashes) == 1


def test_adapters_are_in_the_budget(random_models: list[Path], tmp_path: Path) -> None:
    base = random_models[0]
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(30):
        shapes |= pair(f"model.layers.{layer}.mlp.down_proj", 576, 1536, 256)
        shapes |= pair(f"model.layers.{layer}.self_attn.q_proj", 576, 576, 8)
    shapes |= {f"{FRONT}model.embed_tokens.lora_embedding_A": (64, 49152)}
    shapes |= {f"{FRONT}model.embed_tokens.lora_embedding_B": (576, 64)}
    config = {"r": 256, "rank_pattern": {"q_proj": 8, "embed_tokens": 64}}
    adapter = write_adapter(Kind("smollm2", config, shapes, np.float16), tmp_path / "adapter")
    experts = [f"{base}+{adapter}", f"{base}+0.5*{adapter}"]
    hashes = set()
    for memory, threads in ((112, 1), (192, 2), (1024, 2)):
        arguments = ["-m", "ties", "--base", str(base), *experts, "-P", "density=0.5"]
        arguments += ["--type", "Q4_K_M", "--memory", f"{memory}MiB", "--threads", str(threads)]
        report = run_merge(arguments, tmp_path / f"{memory}.gguf")
        assert int(report["peak_rss_bytes"]) <= memory * MIB
        hashes.add(report["sha256"])
    assert len(hashes) == 1


@pytest.mark.parametrize("method", ["della", "ties"])
def test_the_smallest_budget_works_with_a_cold_cache(
    random_models: list[Path], tmp_path: Path, method: str
) -> None:
    """Kernels are compiled in another process, so that a first merge keeps the budget too."""
    base, *experts = map(str, random_models)
    pruned = {"density": 0.5, "epsilon": 0.1} if method == "della" else {"density": 0.5}
    recipe = make_recipe(
        method, [(e, None) for e in experts], base=base, parameters=pruned, out_type="Q5_K_M"
    )
    with pytest.raises(BudgetError) as error:
        plan(recipe, memory=32 * MIB)
    arguments = [*flags(random_models, method), "-P", "epsilon=0.1", "--type", "Q5_K_M"]
    report = run_merge(
        [*arguments, "--memory", f"{error.value.needed // MIB}MiB"],
        tmp_path / "out.gguf",
        cache=tmp_path / "numba",
    )
    assert int(report["peak_rss_bytes"]) <= error.value.needed
