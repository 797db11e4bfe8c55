from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edgemerge.errors import RuntimeFailure
from edgemerge.runtime.bench.merge_cost import _failure, _files, measure_merge

RECIPE = "merge_method: linear\nmodels:\n- model: base\n- model: a\nparameters: {weight: 0.5}\n"


@pytest.fixture
def recipe(tmp_path: Path, golden_dir: Path) -> Path:
    for name in ("base", "a"):
        shutil.copytree(golden_dir / "inputs_f32" / name, tmp_path / name)
    path = tmp_path / "recipe.yml"
    path.write_text(RECIPE)
    return path


def test_a_merge_is_measured_and_leaves_nothing(recipe: Path) -> None:
    before = sorted(recipe.parent.iterdir())
    cost = measure_merge(recipe, [recipe.parent / "base", recipe.parent / "a"])
    assert sorted(recipe.parent.iterdir()) == before
    assert cost.method == "linear"
    assert cost.seconds > 0.0
    assert cost.cpu_seconds > 0.0
    assert 0 < cost.peak_rss_bytes <= cost.budget_bytes
    tensors = sum(file.stat().st_size for file in recipe.parent.glob("*/*.safetensors"))
    assert cost.read_bytes == pytest.approx(tensors, rel=0.1)
    assert cost.written_bytes == cost.out_bytes
    assert cost.share == pytest.approx(cost.read_bytes / cost.seconds / cost.raw_rate)


def test_a_failed_merge_says_its_own_sentence(recipe: Path) -> None:
    recipe.write_text(RECIPE + "edgemerge: {memory: 1MiB}\n")
    with pytest.raises(RuntimeFailure, match="1 MiB") as caught:
        measure_merge(recipe, [recipe.parent / "base"])
    assert not str(caught.value).startswith("edgemerge")
    assert not list(recipe.parent.glob(".edgemerge-bench-*"))


def test_a_note_before_the_sentence_does_not_hide_it() -> None:
    failure = _failure(Path("r.yml"), 1, "note: the key 'x' is ignored\nedgemerge: no room\nlog")
    assert (str(failure), failure.detail) == ("no room", "log")


def test_a_merge_that_dies_is_told_too() -> None:
    failure = _failure(Path("r.yml"), -9, "Fatal error\nstack")
    assert str(failure) == (
        "r.yml: the merge died (SIGKILL): run edgemerge merge with it by itself"
    )
    assert failure.detail == "Fatal error\nstack"


def test_all_files_of_a_model_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: of a split only the part that is named, and a model with an adapter was taken for a file."""
    monkeypatch.chdir(tmp_path)
    parts = [Path(f"a-{i:05d}-of-00002.gguf") for i in (1, 2)]
    adapter = Path("lora") / "adapter_model.safetensors"
    adapter.parent.mkdir()
    for path in (*parts, Path("base.gguf"), adapter):
        path.touch()
    assert _files([parts[1], Path("base.gguf+0.5*lora")]) == [*parts, Path("base.gguf"), adapter]
