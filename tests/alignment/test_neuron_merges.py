"""Feed-forward neurons in another order: found, brought back, and the function kept."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from edgemerge.alignment.neurons import match_neurons
from edgemerge.errors import FormatError, RecipeError
from edgemerge.formats import open_model
from edgemerge.merging.run import merge
from edgemerge.output.report import MergeReport
from edgemerge.recipe.recipe import load_recipe, make_recipe
from tests.support.fixtures import unpacked


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
    assert "neurons of shuffled.gguf moved in 4 of 4 layers" in report.notes
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
    assert "neurons of expert-b moved in 0 of 4 layers" in report.notes
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


def test_matching_tells_how_many_layers_are_done(models_dir: Path) -> None:
    told: list[tuple[int, int]] = []
    base, expert = (open_model(models_dir / name) for name in ("base", "expert-a"))
    match_neurons(base, expert, memory=1 << 30, progress=lambda *counts: told.append(counts))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
