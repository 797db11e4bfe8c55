"""Feed-forward neurons in another order: found, brought back, and the function kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from edgemerge.alignment.neurons import match_neurons
from edgemerge.errors import BudgetError, FormatError, RecipeError
from edgemerge.formats import open_model
from edgemerge.merging.run import merge, plan
from edgemerge.output.report import MergeReport
from edgemerge.recipe.recipe import load_recipe, make_recipe
from tests.support.fixtures import unpacked
from tests.support.head_models import head_tensors
from tests.support.small_models import write_gguf


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """expert-b as F32 GGUF, and the same with the neurons of every layer shuffled."""
    folder = tmp_path_factory.mktemp("neurons")
    models = unpacked("models")
    plain, shuffled = folder / "plain.gguf", folder / "shuffled.gguf"
    merge(make_recipe("passthrough", [(str(models / "expert-b"), None)], out_type="F32"), plain)
    random = np.random.default_rng(0)
    shuffled.write_bytes(plain.read_bytes())
    tensors = {t.name: t for t in gguf.GGUFReader(plain).tensors}
    out = np.memmap(shuffled, mode="r+", dtype=np.uint8)
    for layer in range(4):
        order = random.permutation(512)
        for part in ("gate", "up", "down"):
            tensor = tensors[f"blk.{layer}.ffn_{part}.weight"]
            moved = tensor.data[order] if part != "down" else tensor.data[:, order]
            raw = np.ascontiguousarray(moved).view(np.uint8).reshape(-1)
            out[tensor.data_offset : tensor.data_offset + raw.size] = raw
    out.flush()
    return plain, shuffled


def merged(files: tuple[Path, Path], output: Path, *, neurons: bool) -> MergeReport:
    recipe = make_recipe(
        "linear", [(str(path), None) for path in files], out_type="F32", neurons=neurons
    )
    return merge(recipe, output, memory=512 << 20)


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    return {t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors}


def test_shuffled_neurons_are_brought_back(files: tuple[Path, Path], tmp_path: Path) -> None:
    report = merged(files, tmp_path / "out.gguf", neurons=True)
    assert "neurons of shuffled.gguf reordered in 4 of 4 layers" in report.notes
    plain = tensors_of(files[0])
    for name, values in tensors_of(tmp_path / "out.gguf").items():
        assert np.array_equal(values, plain[name]), name


def test_without_it_they_are_averaged_away(files: tuple[Path, Path], tmp_path: Path) -> None:
    merged(files, tmp_path / "out.gguf", neurons=False)
    plain, found = tensors_of(files[0]), tensors_of(tmp_path / "out.gguf")
    name = "blk.0.ffn_up.weight"
    assert np.abs(found[name] - plain[name]).mean() > 0.3 * np.abs(plain[name]).mean()


def test_neurons_in_place_stay(models_dir: Path, tmp_path: Path) -> None:
    experts = [(str(models_dir / name), None) for name in ("expert-a", "expert-b")]
    report = merge(
        make_recipe("linear", experts, neurons=True), tmp_path / "on.gguf", memory=512 << 20
    )
    assert "neurons of expert-b reordered in 0 of 4 layers" in report.notes
    merge(make_recipe("linear", experts), tmp_path / "off.gguf")
    off = tensors_of(tmp_path / "off.gguf")
    for name, values in tensors_of(tmp_path / "on.gguf").items():
        assert np.array_equal(values, off[name]), name


def test_the_recipe_key(models_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yml"
    text = f"merge_method: passthrough\nmodels:\n- model: {models_dir / 'base'}\n"
    path.write_text(text + "edgemerge: {neurons: true}\n")
    assert load_recipe(path).neurons
    path.write_text(text + "edgemerge: {neurons: 3}\n")
    with pytest.raises(RecipeError, match=r"edgemerge\.neurons is 3; it must be true or false"):
        load_recipe(path)


def test_a_damaged_model_is_named(files: tuple[Path, Path], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(files[0].read_bytes())
    tensor = next(t for t in gguf.GGUFReader(damaged).tensors if t.name == "blk.1.ffn_up.weight")
    with damaged.open("r+b") as file:
        file.seek(tensor.data_offset + 40)
        file.write(np.float32(np.nan).tobytes())
    with pytest.raises(FormatError, match=r"damaged\.gguf.*ffn_up.*NaN") as caught:
        merged((files[0], damaged), tmp_path / "out.gguf", neurons=True)
    assert caught.value.tensor == "blk.1.ffn_up.weight"
    assert not list(tmp_path.glob("out*"))


# -- layers that are wide for the budget ---------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of one layer with 2048 neurons in another order; two are equal, so SciPy is asked."""
    folder = tmp_path_factory.mktemp("wide")
    random = np.random.default_rng(0)
    order = random.permutation(2048)
    first = head_tensors(4, 2, n_embd=256, key=64, value=64)
    second = dict(first)
    for part in ("gate", "up", "down"):
        neurons = random.standard_normal((2048, 256), np.float32)
        neurons[1] = neurons[0]
        for tensors, rows in ((first, neurons), (second, neurons[order])):
            tensors[f"blk.0.ffn_{part}.weight"] = rows.T.copy() if part == "down" else rows
    return [write_gguf(folder / f"{i}.gguf", x) for i, x in enumerate((first, second))]


def test_wide_layers_are_refused_and_not_left_as_they_are(wide: list[Path], tmp_path: Path) -> None:
    """What a merge makes does not depend on its budget."""
    recipe = make_recipe("linear", [(str(path), None) for path in wide], neurons=True)
    with pytest.raises(BudgetError, match=r"the smallest that works is --memory \d+MiB") as caught:
        plan(recipe, memory=140 << 20)
    needed = caught.value.needed
    assert needed > (8 * 2048**2) + (136 << 20)
    with pytest.raises(BudgetError):
        merge(recipe, tmp_path / "out.gguf", memory=needed - (1 << 20))
    assert not list(tmp_path.iterdir())
    assert plan(recipe, memory=needed).budget == needed


def test_neurons_keep_the_smallest_budget(wide: list[Path], tmp_path: Path) -> None:
    recipe = make_recipe("linear", [(str(path), None) for path in wide], neurons=True)
    with pytest.raises(BudgetError) as caught:
        plan(recipe, memory=1 << 20)
    reports = []
    for memory in (caught.value.needed, 1 << 30):
        command = [sys.executable, "-m", "edgemerge", "merge", "-m", "linear", "--neurons"]
        options: list[str | Path] = [
            "--memory",
            str(memory),
            "-o",
            tmp_path / f"{memory}.gguf",
            "--json",
        ]
        done = subprocess.run([*command, *wide, *options], capture_output=True, check=True)
        reports.append(json.loads(done.stdout))
    assert reports[0]["peak_rss_bytes"] <= caught.value.needed
    assert reports[0]["sha256"] == reports[1]["sha256"]
    assert "neurons of 1.gguf reordered in 1 of 1 layers" in reports[0]["notes"]


def test_matching_tells_how_many_layers_are_done(models_dir: Path) -> None:
    told: list[tuple[int, int]] = []
    base, expert = (open_model(models_dir / name) for name in ("base", "expert-a"))
    match_neurons(base, expert, progress=lambda *counts: told.append(counts))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
