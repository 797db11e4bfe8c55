from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgemerge.recipe.searches import load_search
from edgemerge.searching.inputs import list_inputs, mark_inputs

RECIPE = """
merge_method: linear
models:
  - {model: a.gguf, parameters: {weight: {search: [0, 1]}}, imatrix: own.imatrix}
  - {model: {search: [b.gguf, none.gguf, c.gguf]}, parameters: {weight: 1}}
tokenizer_source: {search: [base, donor]}
edgemerge: {imatrix: {search: [x.imatrix, y.imatrix]}}
"""
FILES = ("a.gguf", "own.imatrix", "b.gguf", "c.gguf", "x.imatrix", "y.imatrix")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yml").write_text(RECIPE)
    Path("donor").mkdir()
    for name in (*FILES, "donor/tokenizer.json", "donor/model.safetensors", "donor/README.md"):
        Path(name).write_text(name)
    return tmp_path


def read() -> tuple[Path, ...]:
    return list_inputs(load_search(Path("recipe.yml")))


def marks() -> str:
    return repr(mark_inputs(read()))


def test_files_of_all_words_are_inputs_though_one_is_not_there(folder: Path) -> None:
    assert set(read()) == {folder / name for name in (*FILES, "donor")}
    assert len(read()) == len(FILES) + 1


@pytest.mark.parametrize("name", [*FILES, "donor/tokenizer.json", "donor/model.safetensors"])
def test_a_file_that_was_changed_is_another(name: str) -> None:
    before = marks()
    assert marks() == before
    os.utime(name, ns=(1, 1))
    assert marks() != before


def test_what_only_lies_beside_a_model_does_not_count() -> None:
    before = marks()
    Path("donor/README.md").write_text("more")
    Path("donor/results.json").write_text("{}")
    assert marks() == before


def test_a_model_that_comes_later_counts() -> None:
    before = marks()
    Path("none.gguf").write_text("here now")
    assert marks() != before


def test_all_parts_of_a_split_count() -> None:
    parts = [Path(f"s-0000{i}-of-00002.gguf") for i in (1, 2)]
    for path in parts:
        path.write_text("part")
    Path("recipe.yml").write_text(RECIPE.replace("c.gguf", parts[0].name))
    before = marks()
    os.utime(parts[1], ns=(1, 1))
    assert marks() != before


def test_a_model_and_its_adapter_count_each() -> None:
    Path("adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        Path("adapter", name).write_text("{}")
    Path("recipe.yml").write_text(RECIPE.replace("c.gguf", "c.gguf+0.5*adapter"))
    before = marks()
    os.utime("adapter/adapter_model.safetensors", ns=(1, 1))
    between = marks()
    assert between != before
    os.utime("c.gguf", ns=(1, 1))
    assert marks() != between
