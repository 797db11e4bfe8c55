"""Updates of inputs that a recipe joins, of another tokenizer, and in folders with names of their own."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from edgemerge.merging.delta import DeltaSettings, make_delta
from edgemerge.merging.extraction import extract
from edgemerge.site.log import read_events
from tests.support.small_models import wide_tensors, write_gguf
from tests.support.updates import (
    KnowingExaminer,
    better,
    folder_of,
    update,
    write_device,
    write_site,
)


@pytest.mark.parametrize("base", ["base.gguf", "base.gguf+0.5*a.lora.gguf"])
def test_a_recipe_may_name_deltas_and_adapters(device: Path, base: str) -> None:
    """Fault: what the recipe joins, as BASE+ADAPTER, was looked for as one file."""
    home = device.parent
    make_delta(home / "base.gguf", home / "b.gguf", home / "b.delta.gguf", DeltaSettings(bits=4))
    extract(home / "base.gguf", home / "a.gguf", home / "a.lora.gguf", rank=4)
    recipe = f"merge_method: task_arithmetic\nbase_model: {base}\nparameters: {{weight: 0.5}}\n"
    recipe += "models: [{model: b.delta.gguf}, {model: base.gguf+a.lora.gguf}]\n"
    (home / "recipe.yml").write_text(recipe)
    write_site(home, base=None, experts=None, merge={"recipe": "recipe.yml"})
    report = update(device, KnowingExaminer(better))
    assert report.outcome == "promoted", report.reason
    assert report.current is not None
    assert {(part.name, part.role) for part in report.current.made_of} == {
        ("base.gguf", "base"),
        ("b.delta.gguf", "delta"),
        ("a.lora.gguf", "adapter"),
    }


def test_texts_are_not_compared_over_other_tokens(device: Path) -> None:
    """Fault: perplexities of two tokenizers were compared, or a traceback left no report."""
    home = device.parent
    (home / "notes.txt").write_text("a " * 1024)
    write_site(home, texts={"notes": "notes.txt"})
    first = update(device, KnowingExaminer(better))
    assert first.outcome == "promoted"
    base, tokens = wide_tensors(0), [str(i) for i in range(40)]
    write_gguf(home / "base.gguf", base, tokens=tokens)
    write_gguf(home / "a.gguf", wide_tensors(1, base), tokens=tokens)
    report = update(device, KnowingExaminer(better))
    assert report.outcome == "failed"
    assert "the new model has another tokenizer than" in report.reason
    assert report.current == first.current
    write_site(home, promote={"watch": 0, "better": []})  # as the sentence says
    assert update(device, KnowingExaminer(better)).outcome == "promoted"


def test_a_folder_whose_name_is_no_utf8(tmp_path: Path) -> None:
    """Fault: neither the log nor the report could be written, and a traceback ended each update."""
    home = tmp_path / os.fsdecode(b"f\xfcr uns")
    write_device(home)
    for name in ("base", "a"):
        shutil.copy(home / f"{name}.gguf", tmp_path)
    paths = [{"path": str(tmp_path / f"{name}.gguf")} for name in ("base", "a")]
    device = write_site(home, reports=".", base=paths[0], experts=paths[1:])
    report = update(device, KnowingExaminer(better))
    assert (report.outcome, report.failures) == ("promoted", []), report.reason
    started = next(read_events(folder_of(device).path / "log.jsonl"))
    assert started["site"] == str(device)
    write_site(home, reports=".", experts=[{"path": "b.gguf"}])
    report = update(device, KnowingExaminer(better))
    assert "is not UTF-8; rename it" in report.reason
    assert json.loads((home / "ward-3.json").read_text())["reason"] == report.reason
