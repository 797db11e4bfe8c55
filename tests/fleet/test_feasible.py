"""What is impossible is said before anything is fetched, merged or made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgemerge.errors import EdgemergeError
from edgemerge.fleet.declared import declare
from edgemerge.fleet.foresight import foresee
from edgemerge.fleet.ingredients import FileHashes
from edgemerge.fleet.site_file import read_site
from edgemerge.site.log import read_events
from tests.support.updates import (
    KnowingExaminer,
    better,
    folder_of,
    update,
    write_site,
)

LINEAR = (
    "{merge_method: linear, parameters: {weight: 1}, models: [{model: a.gguf}, {model: b.gguf}]}"
)
MIXTURE = """
base_model: base.gguf
gate_mode: random
experts: [{source_model: a.gguf}, {source_model: b.gguf}]
"""
STAGES = """
name: first
merge_method: task_arithmetic
base_model: base.gguf
models: [{model: a.gguf, parameters: {weight: 1}}]
---
merge_method: slerp
base_model: first
models: [{model: first}, {model: b.gguf}]
parameters: {t: 0.5}
"""


def merge_of(method: str = "task_arithmetic", **more: Any) -> dict[str, Any]:
    return {"merge": {"method": method, **more}}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (merge_of(type="Q8"), "merge: unknown type 'Q8'"),
        (merge_of("ties", parameters={"density": 50}), "density is 50; it must be a number"),
        (merge_of("slerp"), "slerp needs parameters: {t: …}"),
        (merge_of(align="sideways"), "alignment is 'sideways'; choose one of"),
        ({"base": {"path": "folder"}}, "is a folder, and the first model is compared with"),
        ({"questions": {"bad": "bad.jsonl"}}, "bad.jsonl: line 1: 'answer' must be"),
        (
            {"texts": {"notes": "empty.txt"}},
            "has 0 bytes, and perplexity needs 1024 tokens; give a",
        ),
        ({"texts": {"notes": "short.txt"}}, "has 1023 bytes, and perplexity needs"),
    ],
)
def test_before_the_merge(device: Path, changes: dict[str, Any], says: str) -> None:
    (device.parent / "folder").mkdir()
    line = '{"question": "?", "options": ["a", "b"], "answer": 7}\n'
    (device.parent / "bad.jsonl").write_text(line)
    (device.parent / "empty.txt").touch()
    (device.parent / "short.txt").write_text("a" * 1023)
    write_site(device.parent, **changes)
    with pytest.raises(EdgemergeError, match=r"SITE\.yml|bad\.jsonl") as error:
        foresee(read_site(device), None)
    assert says in str(error.value)
    report = update(device, KnowingExaminer(better))
    assert (report.outcome, report.reason) == ("failed", str(error.value))
    events = [one["event"] for one in read_events(folder_of(device).path / "log.jsonl")]
    assert events == ["failed"]


def test_a_base_that_is_a_folder_will_do_once_a_model_serves(device: Path) -> None:
    assert update(device, KnowingExaminer(better)).outcome == "promoted"
    (device.parent / "folder").mkdir()
    write_site(device.parent, base={"path": "folder"})
    report = update(device, KnowingExaminer(better))
    assert "compared with the base" not in report.reason


@pytest.mark.parametrize("type_", ["q8_0", "Q4_K_M", "KEEP"])
def test_types_have_no_case(device: Path, type_: str) -> None:
    write_site(device.parent, **merge_of(type=type_))
    assert foresee(read_site(device), None)["does"] == "merges"


def write_recipe(device: Path, recipe: str, **changes: Any) -> None:
    (device.parent / "recipe.yml").write_text(recipe)
    changes = {"base": None, "experts": None, "promote": {"watch": 0, "better": []}} | changes
    write_site(device.parent, merge={"recipe": "recipe.yml"}, **changes)


def test_a_recipe_without_a_base_needs_one_beside_it(device: Path) -> None:
    """Fault: it failed after the merge, with a remedy that was refused."""
    write_recipe(device, LINEAR)
    report = update(device, KnowingExaminer(better))
    assert report.outcome == "failed"
    assert "recipe.yml' has no base, and the first model is compared with one" in report.reason
    assert list(folder_of(device).work.iterdir()) == []
    with pytest.raises(EdgemergeError, match="has no base"):
        foresee(read_site(device), None)
    write_recipe(device, LINEAR, base={"path": "base.gguf"})
    examiner = KnowingExaminer(better)
    report = update(device, examiner)
    assert report.outcome == "promoted"
    assert examiner.asked[0] == FileHashes(None).of(device.parent / "base.gguf")
    assert report.current is not None
    assert [part.name for part in report.current.made_of] == ["a.gguf", "b.gguf"]
    write_recipe(device, LINEAR)  # it needs none any more
    assert update(device, KnowingExaminer(better)).outcome == "unchanged"
    write_recipe(device, LINEAR, base={"path": "folder"})
    (device.parent / "folder").mkdir()
    assert "compared with the base" not in update(device, KnowingExaminer(better)).reason


@pytest.mark.parametrize("recipe", [MIXTURE, STAGES], ids=["mixture", "stages"])
def test_a_mixture_and_stages_have_a_base(device: Path, recipe: str) -> None:
    write_recipe(device, recipe)
    base = declare(read_site(device), [], FileHashes(None)).base
    assert base is not None
    assert base.path == device.parent / "base.gguf"


def test_a_model_that_was_lost_is_made_again_without_a_base(device: Path) -> None:
    """Fault: each update failed, as the first model is compared with a base."""
    write_recipe(device, LINEAR, base={"path": "base.gguf"})
    assert update(device, KnowingExaminer(better)).outcome == "promoted"
    write_recipe(device, LINEAR)
    assert update(device, KnowingExaminer(better)).outcome == "unchanged"
    folder = folder_of(device)
    folder.model_path(str(folder.current_id())).unlink()
    assert foresee(read_site(device), None)["does"] == "merges"
    report = update(device, KnowingExaminer(better))
    assert report.reason == "the merge gives the model that serves, whose file was lost"
    assert (report.outcome, report.failures) == ("unchanged", [])


def test_another_model_than_the_lost_one_needs_a_base(device: Path) -> None:
    assert update(device, KnowingExaminer(better)).outcome == "promoted"
    folder, lost = folder_of(device), str(folder_of(device).current_id())
    folder.model_path(lost).unlink()
    write_recipe(device, LINEAR)
    report = update(device, KnowingExaminer(better))
    assert "has no base, and the first model is compared with one" in report.reason
    assert list(folder.work.iterdir()) == []
    digest = declare(read_site(device), [], FileHashes(None)).digest
    settled = {"digest": digest, "id": lost, "time": "", "reason": "", "outcome": "promoted"}
    folder.settle(settled)  # as if the merge had given it
    again = update(device, KnowingExaminer(better))
    assert (again.outcome, again.reason) == ("failed", report.reason)
    events = [one["event"] for one in read_events(folder.path / "log.jsonl")]
    assert events[-2:] == ["merged", "failed"]
