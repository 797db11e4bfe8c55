"""Recipes of several documents: what the stages leave, and what they do not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

import edgemerge
from edgemerge.cli import make_app
from edgemerge.errors import OutputError, RecipeError
from edgemerge.merging import run
from edgemerge.merging.stages import stage_folder
from tests.support.small_models import load_gguf

FIRST = """\
name: first
merge_method: linear
models: [{model: a}, {model: b}]
parameters: {weight: 0.5}
"""
SECOND = """\
name: second
merge_method: slerp
base_model: first
models: [{model: c}]
parameters: {t: 0.3}
"""
LAST = """\
merge_method: task_arithmetic
base_model: base
models: [{model: second}, {model: first}]
parameters: {weight: 0.4}
dtype: float32
"""
CHAIN = f"{FIRST}---\n{SECOND}---\n{LAST}"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden_dir: Path) -> Path:
    """Working directory with the golden models and the recipe."""
    for name in ("base", "a", "b", "c"):
        (tmp_path / name).symlink_to(golden_dir / "inputs_f32" / name)
    (tmp_path / "recipe.yml").write_text(CHAIN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made() -> set[str]:
    return set(os.listdir()) - {"base", "a", "b", "c", "recipe.yml"}


def merge(output: str = "out.gguf", **options: Any) -> edgemerge.MergeReport:
    return edgemerge.merge(edgemerge.load_recipe("recipe.yml"), output, **options)


def merge_by_hand() -> None:
    """Do the same with one recipe after the other, and F32 files between them."""
    for text in (FIRST, SECOND, LAST):
        document = yaml.safe_load(text)
        name = document.pop("name", "hand")
        document["out_dtype"] = "float32"
        for model in [document, *document["models"]]:
            for key in ("model", "base_model"):
                if model.get(key) in ("first", "second"):
                    model[key] += ".gguf"
        Path("hand.yml").write_text(yaml.safe_dump(document))
        edgemerge.merge(edgemerge.load_recipe("hand.yml"), f"{name}.gguf")


def test_a_chain_gives_what_its_recipes_give_one_by_one() -> None:
    report = merge()
    assert made() == {"out.gguf"}
    merge_by_hand()
    chain, hand = load_gguf(Path("out.gguf")), load_gguf(Path("hand.gguf"))
    assert chain.keys() == hand.keys()
    assert all(np.array_equal(chain[name], hand[name]) for name in hand)
    assert "stage first: linear, 92.8 KiB as F32, removed" in report.notes
    assert report.models == ("base", "second.gguf", "first.gguf")
    assert report.written_bytes > 3 * 88_000


def test_the_bytes_do_not_depend_on_where_the_output_is(folder: Path) -> None:
    (folder / "else").mkdir()
    assert merge().sha256 == merge("else/other.gguf").sha256


def test_the_file_says_what_its_stages_were_made_of() -> None:
    merge()
    field = gguf.GGUFReader("out.gguf").fields["edgemerge.stages"]
    first, second = json.loads(field.contents())
    assert (first["name"], first["inputs"]) == ("first", ["a", "b"])
    assert (second["name"], second["inputs"]) == ("second", ["first.gguf", "c"])
    assert json.loads(second["recipe"])["method"] == "slerp"
    said = CliRunner().invoke(make_app(), ["verify", "out.gguf"], prog_name="edgemerge").stdout
    assert "stage second: slerp: t 0.3" in said
    assert "stage second: base first.gguf" in said
    assert all(
        len(stage["input_crc32"]) == 2 and any(stage["input_crc32"]) for stage in (first, second)
    )


def test_all_stages_are_planned_before_the_first_is_made() -> None:
    Path("recipe.yml").write_text(CHAIN.replace("method: task_arithmetic", "method: passthrough"))
    with pytest.raises(RecipeError, match="passthrough takes 1 model, not 2"):
        merge()
    assert made() == set()


def test_a_stage_in_slices_has_the_layers_that_it_will_have() -> None:
    """Fault: two checksums of inputs counted as a setting of each of two layers."""
    slices = "slices: [{sources: [{model: first, layer_range: [0, 2]}]}, "
    last = f"merge_method: passthrough\n{slices}{{sources: [{{model: a, layer_range: [1, N]}}]}}]\n"
    Path("recipe.yml").write_text(f"{FIRST}---\n{last.replace('N', '2')}")
    merge()
    assert gguf.GGUFReader("out.gguf").fields["llama.block_count"].contents() == 3
    Path("recipe.yml").write_text(
        f"{FIRST}---\n{last.replace('[0, 2]', '[1, 3]').replace('N', '2')}"
    )
    with pytest.raises(RecipeError, match=r"layer_range \[1, 3\] goes past the 2 layers of first"):
        merge("other.gguf")


# -- disk ------------------------------------------------------------------------------------------


def test_files_of_a_split_in_the_way_are_told_before_the_stages(
    stop_at: Callable[[str | None], list[str]],
) -> None:
    merge(split_bytes=40 << 10)
    parts = made()
    assert len(parts) > 1
    for part in sorted(parts)[1:]:
        Path(part).unlink()
    ran = stop_at(None)
    with pytest.raises(OutputError, match=r"out-00001-of-0000\d.gguf: exists already"):
        merge(split_bytes=40 << 10)
    assert ran == []
    assert made() == {min(parts)}
    merge(split_bytes=40 << 10, force=True)
    assert made() == parts


def test_stages_stay_within_the_disk_that_is_allowed() -> None:
    with pytest.raises(OutputError, match="the stages need 177 KiB of disk, more than the 100 KiB"):
        merge(disk=100 << 10)
    assert made() == set()
    assert merge(disk=200 << 10).out_bytes > 0


def test_stages_that_do_not_fit_on_the_disk_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("edgemerge.merging.stages.shutil.disk_usage", lambda path: Usage)
    with pytest.raises(OutputError, match=r"need 266 KiB of disk, and 1000 bytes are free"):
        merge()
    assert made() == set()


@pytest.mark.parametrize(
    ("begun", "options"),
    [
        (["out.gguf.stages/second.gguf.part"], {}),
        (["out.gguf.part"], {}),
        (
            ["out-00001-of-00003.gguf.part", "out-00003-of-00003.gguf.part"],
            {"split_bytes": 40 << 10},
        ),
        (["out.gguf.part/model.safetensors.part", "out.gguf.part/config.json"], {"format": "hf"}),
    ],
    ids=["stage", "output", "split", "directory"],
)
def test_what_an_interrupted_run_left_has_its_room(
    stop_at: Callable[[str | None], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    begun: list[str],
    options: dict[str, Any],
) -> None:
    """Fault: parts were missing from what is free, and stood in what is needed."""
    stop_at("second.gguf")
    with pytest.raises(KeyboardInterrupt):
        merge()
    for name in begun:  # as SIGKILL leaves them
        Path(name).parent.mkdir(exist_ok=True)
        with Path(name).open("wb") as part:
            os.posix_fallocate(part.fileno(), 0, 80_000 // len(begun))

    def measure(_folder: Path) -> SimpleNamespace:
        """Measure a disk that is hardly larger than the stages and the output."""
        files = [Path(root, name) for root, _, names in os.walk(".") for name in names]
        return SimpleNamespace(free=(290 << 10) - sum(512 * f.stat().st_blocks for f in files))

    monkeypatch.setattr("edgemerge.merging.stages.shutil.disk_usage", measure)
    recipe, split = edgemerge.load_recipe("recipe.yml"), options.get("split_bytes")
    stop_at(None)
    recipe = replace(recipe, out_format=options.get("format", "gguf"))
    assert edgemerge.merge(recipe, "out.gguf", split_bytes=split).written_bytes > 0


def test_a_folder_with_something_else_in_it_is_not_touched(folder: Path) -> None:
    stages = stage_folder(folder / "out.gguf")
    stages.mkdir()
    (stages / "thesis.txt").write_text("years")
    with pytest.raises(OutputError, match=r"has a file 'thesis\.txt' that is none"):
        merge()
    assert (stages / "thesis.txt").read_text() == "years"


# -- going on ----------------------------------------------------------------------------------------


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], list[str]]:
    """Interrupt the merge whose file has a name; return the list of merges that really ran."""
    ran: list[str] = []
    run_one = run.make_tensors  # type: ignore[attr-defined]

    def set_stop(name: str | None) -> list[str]:
        def run_or_stop(the_plan: Any, inputs: Any, parts: Any, *args: Any) -> Any:
            found = parts.files[0].path.name
            if found == name:
                raise KeyboardInterrupt
            ran.append(found)
            return run_one(the_plan, inputs, parts, *args)

        monkeypatch.setattr(run, "make_tensors", run_or_stop)
        ran.clear()
        return ran

    return set_stop


@pytest.mark.parametrize(
    ("name", "again"),
    [("second.gguf", ["second.gguf", "out.gguf"]), ("out.gguf", ["out.gguf"])],
)
def test_an_interrupted_chain_takes_finished_stages_over(
    stop_at: Callable[[str | None], list[str]], name: str, again: list[str]
) -> None:
    stop_at(name)
    with pytest.raises(KeyboardInterrupt) as caught:
        merge()
    assert "to go on after the finished stages" in "".join(caught.value.__notes__)
    assert made() == {"out.gguf.stages"}
    ran = stop_at(None)
    digest = merge().sha256
    assert ran == again
    assert made() == {"out.gguf"}
    assert merge("anew.gguf").sha256 == digest


def test_a_finished_stage_of_another_recipe_is_made_again(
    stop_at: Callable[[str | None], list[str]],
) -> None:
    stop_at("out.gguf")
    with pytest.raises(KeyboardInterrupt):
        merge()
    Path("recipe.yml").write_text(CHAIN.replace("t: 0.3", "t: 0.4"))
    ran = stop_at(None)
    merge()
    assert ran == ["second.gguf", "out.gguf"]


# -- the command line --------------------------------------------------------------------------------


def test_plan_says_what_the_stages_are_and_take() -> None:
    text = CliRunner().invoke(make_app(), ["plan", "recipe.yml"], prog_name="edgemerge").stdout
    assert "stage first: linear of 2 models to F32, reads 177 KiB, writes 88.6 KiB\n" in text
    assert "stage second: slerp of 2 models to F32" in text
    assert "the stages take 177 KiB of disk in OUT.gguf.stages until the merge is done\n" in text
    assert "  model  stage second\n" in text
    given = ["plan", "recipe.yml", "--json"]
    document = json.loads(CliRunner().invoke(make_app(), given, prog_name="edgemerge").stdout)
    assert [(s["name"], s["file_type"]) for s in document["stages"]] == [
        ("first", "F32"),
        ("second", "F32"),
    ]


def test_merge_takes_strict_and_disk() -> None:
    def invoke(*options: str) -> tuple[int, str]:
        given = ["merge", "recipe.yml", "-o", "out.gguf", "--no-ask", *options]
        result = CliRunner().invoke(make_app(), given, prog_name="edgemerge")
        return result.exit_code, result.stderr

    code, said = invoke("--disk", "50KiB")
    assert code == 1
    assert "allow more with --disk" in said
    Path("recipe.yml").write_text(CHAIN + "stray: 1\n")
    code, said = invoke("--strict")
    assert code == 1
    assert "the recipe has the unknown key 'stray'" in said
    assert made() == set()
    assert invoke()[0] == 0
