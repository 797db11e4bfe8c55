from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgemerge.merging.run import merge
from edgemerge.recipe.recipe import make_recipe
from edgemerge.searching.model_file import ModelFile
from edgemerge.types import Progress, Recipe
from tests.support.searches import write_search
from tests.support.small_models import stored


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_search(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(
    scale: Any, method: str = "task_arithmetic", *, align: str | None = None, **given: Any
) -> Recipe:
    models = [("a.gguf", 1.0), ("b.gguf", 0.5)]
    return make_recipe(
        method,
        models,
        base="base.gguf",
        parameters={"lambda": scale, **given},
        out_type="F16",
        align=align,
    )


def merged(wanted: Recipe) -> dict[str, tuple[str, bytes]]:
    merge(wanted, "merged.gguf", force=True)
    return stored(Path("merged.gguf"))


def by_kind(value: float) -> object:
    return [{"filter": "mlp", "value": value}, {"value": 0.7}]


def test_only_what_changed_is_made_and_all_is_as_merged() -> None:
    first, second = recipe(by_kind(0.3)), recipe(by_kind(0.9))
    with ModelFile(Path("m.gguf"), memory=None, threads=2) as file:
        assert file.make(first) == 21
        assert stored(file.path) == merged(first)
        assert file.make(second) == 6  # gate, up and down of two layers
        assert stored(file.path) == merged(second)
        assert file.make(second) == 0
        assert file.n_bytes == file.path.stat().st_size
        assert file.path.name == "m.gguf.part"
    assert not Path("m.gguf.part").exists()


def test_another_type_or_method_makes_all_anew() -> None:
    with ModelFile(Path("m.gguf"), memory=None, threads=1) as file:
        file.make(recipe(1.0))
        wanted = make_recipe("linear", [("a.gguf", 1.0), ("b.gguf", 1.0)], out_type="F32")
        assert file.make(wanted) == 21
        assert stored(file.path) == merged(wanted)


def test_another_model_of_the_same_shapes_is_another_merge() -> None:
    with ModelFile(Path("m.gguf"), memory=None, threads=1) as file:
        for models in (("a.gguf", "b.gguf"), ("b.gguf", "a.gguf")):
            wanted = make_recipe("linear", [(models[0], 1.0), (models[1], 0.5)], out_type="F16")
            assert file.make(wanted) == 21
            assert stored(file.path) == merged(wanted)


def test_a_method_that_measures_layers_makes_whole_layers() -> None:
    first, second = (
        recipe(by_kind(value), "hierarchical", align="hard", scope="block") for value in (0.3, 0.9)
    )
    with ModelFile(Path("m.gguf"), memory=None, threads=2) as file:
        file.make(first)
        begun: list[str] = []

        def note(label: str, _unit: str | None = None) -> Progress:
            begun.append(label)
            return lambda _done, _total: None

        assert 6 < file.make(second, note) < 21
        assert begun == ["merging"]  # heads were aligned for the first one
        assert stored(file.path) == merged(second)
        third = recipe(by_kind(0.9), "hierarchical", align="off", scope="block")
        assert file.make(third) == 21
        assert stored(file.path) == merged(third)


def test_a_tensor_that_leaves_the_sum_of_its_layer_changes_the_others() -> None:
    first, second = (
        recipe(
            0.7,
            "hierarchical",
            align="off",
            scope=[{"filter": "mlp", "value": word}, {"value": "block"}],
        )
        for word in ("block", "tensor")
    )
    with ModelFile(Path("m.gguf"), memory=None, threads=2) as file:
        file.make(first)
        file.make(second)
        assert stored(file.path) == merged(second)
        file.make(first)
        assert stored(file.path) == merged(first)


@pytest.mark.parametrize("align", ["off", "hard"])
def test_heads_and_neurons_are_matched_anew_with_another_reference(align: str) -> None:
    with ModelFile(Path("m.gguf"), memory=None, threads=2) as file:
        for method in (
            "task_arithmetic",
            "linear",
        ):  # linear compares a with b, and none with the base
            wanted = replace(recipe(0.7, method, align=align), neurons=True)
            file.make(wanted)
            assert stored(file.path) == merged(wanted)


def test_what_was_interrupted_is_made_again() -> None:
    first, second = recipe(0.3), recipe(0.9)
    with ModelFile(Path("m.gguf"), memory=None, threads=1) as file:
        file.make(first)

        def stop(_label: str, _unit: str | None = None) -> object:
            def show(done: int, total: int) -> None:
                raise KeyboardInterrupt

            return show

        with pytest.raises(KeyboardInterrupt):
            file.make(second, stop)  # type: ignore[arg-type]
        file.make(first)
        assert stored(file.path) == merged(first)
