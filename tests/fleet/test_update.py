"""An update from its start to its end, with an examiner that knows the answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from edgemerge.errors import FormatError, OutputError
from edgemerge.fleet.promotion import Talk
from edgemerge.fleet.site_file import read_site
from edgemerge.fleet.switch import roll_back_by_hand
from edgemerge.site.lock import Busy
from edgemerge.site.log import read_events
from edgemerge.site.record import Score
from tests.support.updates import (
    KnowingExaminer,
    better,
    folder_of,
    state_of,
    update,
    worse,
    write_site,
)


def events(path: Path) -> list[str]:
    return [one["event"] for one in read_events(folder_of(path).path / "log.jsonl")]


def by_expert(path: Path, right: Mapping[str, int]) -> Callable[[Path], Mapping[str, int]]:
    """Right answers on diseases by the expert that a model was made of; of the base 50."""

    def tell(model: Path) -> Mapping[str, int]:
        known = [one for one in folder_of(path).records() if one.id == model.stem]
        expert = known[0].made_of[1].name if known else "base"
        return {"disease": right.get(expert, 50), "general": 100}

    return tell


def test_a_better_model_is_promoted_and_then_nothing_changes(device: Path) -> None:
    examiner = KnowingExaminer(better)
    report = update(device, examiner)
    assert (report.outcome, report.failures) == ("promoted", [])
    assert "disease: 50 and 150 of 200 right, +50.0 points" in report.reason
    folder = folder_of(device)
    record = folder.current()
    assert record is not None
    assert record == report.current
    assert record.scores == {"disease": Score(150, 200), "general": Score(100, 200)}
    assert [(part.name, part.role) for part in record.made_of] == [
        ("base.gguf", "base"),
        ("a.gguf", "expert"),
    ]
    assert record.settings == {"lambda": 0.5, "type": "Q8_0"}
    assert state_of(folder)["serves"] == record.sha256
    assert events(device) == ["started", "merged", "decided", "promoted", "watched", "finished"]
    again = update(device, examiner)
    assert (again.outcome, again.current) == ("unchanged", record)
    assert len(examiner.asked) == 2
    assert update(device, examiner, again=True).reason == "the merge gives the model that serves"


def test_a_worse_model_is_refused_and_its_file_goes(device: Path) -> None:
    report = update(device, KnowingExaminer(worse))
    assert report.outcome == "refused"
    assert report.reason.startswith("general: 100 and 40 of 200 right, -30.0 points")
    assert "so more than 2 may be lost; no task is better" in report.reason
    assert report.current is None
    folder = folder_of(device)
    assert list(folder.models.glob("*.gguf")) == []
    assert [one.decision for one in folder.records()] == ["refused"]
    answers = folder.answers / f"{'b' * 16}-0.json"
    answers.touch()  # the base's
    assert update(device, KnowingExaminer(worse), again=True).outcome == "refused"
    assert answers.exists()
    assert update(device, KnowingExaminer(better)).outcome == "unchanged"
    assert update(device, KnowingExaminer(better), again=True).outcome == "promoted"


def test_the_model_that_serves_is_what_a_new_one_is_compared_with(device: Path) -> None:
    right = {"a.gguf": 100, "b.gguf": 80}
    examiner = KnowingExaminer(by_expert(device, right))
    first = update(device, examiner).current
    assert first is not None
    write_site(device.parent, experts=[{"path": "b.gguf"}])
    report = update(device, examiner)  # better than the base, and worse than the model that serves
    assert report.outcome == "refused"
    assert report.current == first
    assert examiner.asked[-2:] == [first.sha256, report.tried.sha256 if report.tried else ""]


def test_a_new_model_that_crashes_is_refused(device: Path) -> None:
    report = update(device, KnowingExaminer(better, crashes=True))
    assert report.outcome == "refused"
    assert "llama.cpp ended the process" in report.reason


def test_a_slow_model_is_refused(device: Path) -> None:
    update(device, KnowingExaminer(better))
    write_site(device.parent, experts=[{"path": "b.gguf"}])
    current = folder_of(device).current_id()
    examiner = KnowingExaminer(by_expert(device, {"a.gguf": 60, "b.gguf": 150}))
    examiner.speeds = {str(current): 160.0}
    report = update(device, examiner)
    assert report.outcome == "refused"
    assert report.reason == "speed: 160 and 100 tokens/s, more than 1.5 times slower"


def test_a_busy_moment_makes_no_model_slow(device: Path) -> None:
    measured = iter([1978.0, 562.0, 657.0, 562.0])  # of the old and the new one in turn

    class Hurried(KnowingExaminer):
        def talk(self, model: Path) -> Talk:
            return replace(super().talk(model), speed=next(measured, 600.0))

    report = update(device, Hurried(better))
    assert report.outcome == "promoted"
    assert "speed: 657 and 562 tokens/s" in report.reason
    measured = iter([1978.4, 562.0] * 4)
    write_site(device.parent, experts=[{"path": "b.gguf"}], promote={"watch": 0, "better": []})
    report = update(device, Hurried(better))
    assert report.reason == "speed: 1978 and 562 tokens/s, more than 1.5 times slower"


def test_a_model_that_fails_after_its_promotion_is_rolled_back(device: Path) -> None:
    first = update(device, KnowingExaminer(better)).current
    write_site(device.parent, experts=[{"path": "b.gguf"}])
    examiner = KnowingExaminer(by_expert(device, {"a.gguf": 60, "b.gguf": 150}))
    examiner.problems = [None, None, "llama.cpp crashed"]  # old, new, and in the watch
    report = update(device, examiner)
    assert report.outcome == "rolled_back"
    assert report.reason == "it cannot be asked the smoke question (llama.cpp crashed)"
    assert report.current == first
    assert report.tried is not None
    assert report.tried.decision == "rolled_back"
    assert events(device)[-4:] == ["decided", "promoted", "rolled_back", "finished"]
    assert update(device, KnowingExaminer(better)).outcome == "unchanged"  # it is not tried again


def test_the_first_model_has_none_to_roll_back_to(device: Path) -> None:
    examiner = KnowingExaminer(better, problems=[None, None, "llama.cpp crashed"])
    report = update(device, examiner)
    assert report.outcome == "failed"
    assert report.reason.endswith("there is no earlier model to roll back to")


def test_a_roll_back_by_hand(device: Path) -> None:
    examiner = KnowingExaminer(by_expert(device, {"a.gguf": 60, "b.gguf": 150}))
    write_site(device.parent, reports=".", promote={"watch": 0, "better": []})
    with pytest.raises(OutputError, match="no model that serves"):
        roll_back_by_hand(read_site(device), examiner, None, reason="odd", by="eve")
    first = update(device, examiner).current
    with pytest.raises(OutputError, match="no earlier model"):
        roll_back_by_hand(read_site(device), examiner, None, reason="odd", by="eve")
    changes: dict[str, Any] = {"reports": ".", "promote": {"watch": 0, "better": []}}
    write_site(device.parent, experts=[{"path": "b.gguf"}], **changes)
    second = update(device, examiner).current
    report = roll_back_by_hand(read_site(device), examiner, None, reason="odd", by="eve")
    assert (report.outcome, report.reason, report.current) == ("rolled_back", "odd", first)
    assert report.tried is not None
    assert second is not None
    assert report.tried.id == second.id
    assert events(device)[-3:] == ["asked", "rolled_back", "finished"]
    assert json.loads((device.parent / "ward-3.json").read_text())["outcome"] == "rolled_back"
    assert update(device, examiner).outcome == "unchanged"


def test_another_model_that_was_chosen_meanwhile_stays(device: Path) -> None:
    first = update(device, KnowingExaminer(better)).current
    assert first is not None
    folder = folder_of(device)
    folder.try_({"digest": "0", "step": "watch", "id": "f" * 16, "reason": "", "baseline": None})
    report = update(device, KnowingExaminer(better))
    assert (report.outcome, report.current) == ("unchanged", first)
    assert folder.trying() is None


def test_another_model_that_was_promoted_by_hand_is_told_of(device: Path) -> None:
    first = update(device, KnowingExaminer(better)).current
    write_site(device.parent, experts=[{"path": "b.gguf"}], promote={"watch": 0, "better": []})
    update(device, KnowingExaminer(better))
    assert first is not None
    folder_of(device).promote(first.id, "on the page")
    report = update(device, KnowingExaminer(better))
    assert (report.outcome, report.current) == ("unchanged", folder_of(device).current())
    assert report.reason.endswith("by hand, another model was put in its place")


def test_what_is_done_again_goes_on_after_a_power_cut(device: Path) -> None:
    update(device, KnowingExaminer(worse))
    settled = folder_of(device).settled()
    assert settled is not None
    folder_of(device).try_({"digest": settled["digest"], "step": "merge", "started": ""})
    assert update(device, KnowingExaminer(better)).outcome == "promoted"


def test_the_report_of_a_run(device: Path) -> None:
    write_site(device.parent, reports="reports")
    report = update(device, KnowingExaminer(better))
    assert ["reports" in failure for failure in report.failures] == [True]
    (device.parent / "reports").mkdir()
    update(device, KnowingExaminer(better))
    told = json.loads((device.parent / "reports" / "ward-3.json").read_text())
    keys = "edgemerge_report device time outcome reason settled current tried previous seconds"
    assert list(told) == f"{keys} bytes_fetched versions edgemerge failures".split()
    assert told["outcome"] == "unchanged"
    assert told["settled"]["outcome"] == told["current"]["decision"] == "promoted"
    assert (
        told["versions"]["a.gguf"]
        == folder_of(device).record(told["current"]["id"]).made_of[1].sha256[:16]
    )


def test_what_cannot_be_merged_fails_and_leaves_what_serves(device: Path) -> None:
    first = update(device, KnowingExaminer(better)).current
    (device.parent / "c.gguf").write_bytes(b"GGUF" + bytes(100))
    write_site(device.parent, experts=[{"path": "c.gguf"}])
    report = update(device, KnowingExaminer(better))
    assert report.outcome == "failed"
    assert "c.gguf" in report.reason
    assert report.current == first
    assert events(device)[-1] == "failed"
    write_site(device.parent)
    assert update(device, KnowingExaminer(better)).outcome == "unchanged"


@pytest.mark.parametrize("broken", ["lock", "log.jsonl"])
def test_a_disk_that_takes_no_changes_is_reported(device: Path, broken: str) -> None:
    first = update(device, KnowingExaminer(better)).current
    (device.parent / "reports").mkdir()
    (folder_of(device).path / broken).unlink()
    (folder_of(device).path / broken).mkdir()  # a folder cannot be written to, by root either
    write_site(device.parent, reports="reports", experts=[{"path": "b.gguf"}])
    report = update(device, KnowingExaminer(better))
    told = json.loads((device.parent / "reports" / "ward-3.json").read_text())
    assert told["outcome"] == report.outcome == "failed"
    assert broken in told["reason"]
    assert report.current == first


def test_two_updates_at_once(device: Path) -> None:
    update(device, KnowingExaminer(better))
    (device.parent / "reports").mkdir()
    write_site(device.parent, reports="reports")
    with folder_of(device).locked(), pytest.raises(Busy, match="another update is at work there"):
        update(device, KnowingExaminer(better))
    assert list((device.parent / "reports").iterdir()) == []  # the other one writes it


def test_a_recipe_names_the_models_itself(device: Path) -> None:
    recipe = "merge_method: task_arithmetic\nbase_model: base.gguf\nmodels: [{model: b.gguf, "
    recipe += "parameters: {weight: 0.5}}]\nedgemerge: {type: Q8_0}\n"
    (device.parent / "recipe.yml").write_text(recipe)
    write_site(device.parent, base=None, experts=None, merge={"recipe": "recipe.yml"})
    report = update(device, KnowingExaminer(better))
    assert report.outcome == "promoted"
    assert report.current is not None
    assert [part.name for part in report.current.made_of] == ["base.gguf", "b.gguf"]
    assert update(device, KnowingExaminer(better)).outcome == "unchanged"
    (device.parent / "recipe.yml").write_text(recipe.replace("0.5", "0.4"))
    assert update(device, KnowingExaminer(better)).outcome != "unchanged"


def test_the_last_models_are_kept(device: Path) -> None:
    examiner = KnowingExaminer(lambda _model: {"disease": 50, "general": 100})
    for number in range(4):
        merge = {"method": "task_arithmetic", "parameters": {"lambda": 0.2 + number / 10}}
        changes: dict[str, Any] = {"keep": 2, "promote": {"watch": 0, "better": []}}
        write_site(device.parent, merge=merge, **changes)
        assert update(device, examiner).outcome == "promoted"
    folder = folder_of(device)
    assert len(list(folder.models.glob("*.gguf"))) == 2
    assert len(folder.history()) == 4
    assert folder.previous() == folder.history()[-2]


# -- a registry --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FakeEntry:
    name: str
    version: str
    file_name: str
    n_bytes: int
    sha256: str
    kind: str = "model"
    publisher: str = "0" * 32
    base: str | None = None


@dataclass
class FakeRegistry:
    """Serves files of a folder as versions of models."""

    entries: dict[tuple[str, str], FakeEntry]
    folder: Path
    fetched: list[str] = field(default_factory=list)
    is_down: bool = False

    def refresh(self) -> None:
        if self.is_down:
            raise FormatError("cannot be reached", path="registry")

    def find(self, name: str, version: str | None) -> FakeEntry:
        newest = max(v for n, v in self.entries if n == name)
        return self.entries[name, version or newest]

    def fetch(self, entry: FakeEntry, folder: Path, progress: Callable[[int, int], None]) -> Path:
        target = folder / entry.file_name
        if not target.exists():
            target.write_bytes((self.folder / entry.file_name).read_bytes())
            self.fetched.append(entry.file_name)
        return target


def test_the_newest_of_a_registry_is_fetched(device: Path) -> None:
    def entry(name: str, version: str, source: str) -> FakeEntry:
        raw = (device.parent / source).read_bytes()
        (device.parent / f"{name}-{version}.gguf").write_bytes(raw)
        from hashlib import sha256

        file_name = f"{name}-{version}.gguf"
        return FakeEntry(name, version, file_name, len(raw), sha256(raw).hexdigest())

    registry = FakeRegistry(
        {
            ("tiny", "1"): entry("tiny", "1", "base.gguf"),
            ("disease", "1"): entry("disease", "1", "a.gguf"),
        },
        device.parent,
    )
    (device.parent / "root.json").write_text("{}")
    write_site(
        device.parent,
        registry={"address": "https://example.org/r", "trust": "root.json"},
        base={"name": "tiny", "version": 1},
        experts=[{"name": "disease", "weight": 0.5}],
        promote={"watch": 0, "better": []},
    )
    examiner = KnowingExaminer(better)
    first = update(device, examiner, registry=registry)
    assert (first.outcome, first.versions) == ("promoted", {"tiny": "1", "disease": "1"})
    assert first.bytes_fetched == sum(one.n_bytes for one in registry.entries.values())
    assert first.current is not None
    assert first.current.signed_by == "0" * 32
    assert first.current.settings["weights"] == {"disease": 0.5}
    assert update(device, examiner, registry=registry).outcome == "unchanged"
    assert len(registry.fetched) == 2
    registry.entries["disease", "2"] = entry("disease", "2", "b.gguf")
    second = update(device, examiner, registry=registry)
    assert (second.outcome, second.bytes_fetched) == (
        "promoted",
        registry.entries["disease", "2"].n_bytes,
    )
    assert sorted(path.name for path in folder_of(device).inputs.iterdir()) == [
        "disease-2.gguf",
        "tiny-1.gguf",
    ]
    registry.entries["disease", "3"] = entry("disease", "3", "a.gguf")
    assert second.current is not None
    known = second.current.id

    def forgetful(model: Path) -> Mapping[str, int]:
        return {"disease": 150, "general": 100 if model.stem == known else 40}

    for outcome in ("refused", "unchanged"):  # what serves is made of the second still
        report = update(device, KnowingExaminer(forgetful), registry=registry)
        assert report.outcome == outcome
        assert report.versions == {"tiny": "1", "disease": "2"}
    registry.is_down = True
    assert update(device, examiner, registry=registry).outcome == "failed"
    assert folder_of(device).current() == second.current
