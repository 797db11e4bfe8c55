"""Updates and roll backs in the folder of SITE.yml, where people have files, and what ends them early."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from edgemerge.errors import OutputError, RecipeError, RuntimeFailure
from edgemerge.fleet.examination import Show
from edgemerge.fleet.foresight import foresee
from edgemerge.fleet.report import reporting
from edgemerge.fleet.server import Server
from edgemerge.fleet.site_file import ServerPlace, read_site
from edgemerge.fleet.switch import roll_back_by_hand
from edgemerge.runtime.evaluation.answers import Answers
from edgemerge.site.folder import SiteFolder
from edgemerge.site.log import read_events
from tests.support.updates import (
    KnowingExaminer,
    better,
    folder_of,
    update,
    worse,
    write_site,
)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*") if one.is_file()
    }


def test_an_update_leaves_models_of_its_user(device: Path) -> None:
    home = device.parent
    (home / "models").mkdir()
    for name in ("base", "a"):
        shutil.move(home / f"{name}.gguf", home / "models" / f"{name}.gguf")
    (home / "work" / "thesis").mkdir(parents=True)
    (home / "work" / "thesis" / "text.tex").write_text("mine")
    base, experts = {"path": "models/base.gguf"}, [{"path": "models/a.gguf"}]
    write_site(home, folder=None, base=base, experts=experts, reports=".")
    before = contents(home)
    report = update(device, KnowingExaminer(worse))
    assert report.outcome == "failed"
    assert "has models/, work/ of somebody else" in report.reason
    after = contents(home)
    assert json.loads(after.pop("ward-3.json"))["reason"] == report.reason
    assert after == before
    assert update(device, KnowingExaminer(worse)).reason == report.reason
    with pytest.raises(OutputError, match="of somebody else"):
        foresee(read_site(device), None)
    write_site(home, base=base, experts=experts)  # in a folder of its own
    assert update(device, KnowingExaminer(lambda _: {"disease": 50})).outcome == "refused"
    assert {name: contents(home)[name] for name in before if name != "SITE.yml"} == {
        name: raw for name, raw in before.items() if name != "SITE.yml"
    }


def test_the_folder_of_the_file_is_taken_where_nothing_is_in_the_way(device: Path) -> None:
    write_site(device.parent, folder=None)
    assert update(device, KnowingExaminer(better)).outcome == "promoted"
    assert (device.parent / "a.gguf").is_file()


def test_models_that_no_update_removes_may_be_inputs(device: Path) -> None:
    assert update(device, KnowingExaminer(worse)).outcome == "refused"
    home = device.parent / "site" / "models"
    shutil.copy(device.parent / "b.gguf", home / "b.gguf")
    shutil.copy(device.parent / "disease.jsonl", home / "disease.jsonl")
    questions = {"disease": "site/models/disease.jsonl", "general": "general.jsonl"}
    write_site(device.parent, experts=[{"path": "site/models/b.gguf"}], questions=questions)
    assert update(device, KnowingExaminer(better)).outcome == "promoted"
    assert (home / "b.gguf").is_file()
    made = home.joinpath(f"{folder_of(device).current_id()}.gguf")
    write_site(device.parent, base={"path": f"site/models/{made.name}"})
    assert "which lies in models/ of the device" in update(device, KnowingExaminer(better)).reason


@pytest.mark.parametrize("call", ["is_dir", "is_file"])
def test_a_folder_that_cannot_be_read_is_reported(
    call: str, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update(device, KnowingExaminer(better))
    write_site(device.parent, reports="reports")
    (device.parent / "reports").mkdir()
    home, real = device.parent / "site", getattr(Path, call)

    def refuse(path: Path) -> object:
        if path.is_relative_to(home):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, call, refuse)
    report = update(device, KnowingExaminer(better))
    told = json.loads((device.parent / "reports" / "ward-3.json").read_text())
    assert told["outcome"] == report.outcome == "failed"
    assert "Permission denied" in told["reason"]


@pytest.mark.parametrize("folder", ["inputs", "work", "answers"])
def test_what_lies_where_files_are_removed_is_no_input(device: Path, folder: str) -> None:
    assert update(device, KnowingExaminer(worse)).outcome == "refused"
    home = device.parent / "site" / folder
    shutil.copy(device.parent / "b.gguf", home / "b.gguf")
    (device.parent / "link.gguf").symlink_to(home / "b.gguf")
    shutil.copy(device.parent / "disease.jsonl", home / "disease.jsonl")
    for changes in (
        {"experts": [{"path": f"site/{folder}/b.gguf"}]},
        {"experts": [{"path": "link.gguf"}]},
        {"questions": {"disease": f"site/{folder}/disease.jsonl"}},
    ):
        write_site(device.parent, **changes)
        report = update(device, KnowingExaminer(better))
        assert report.outcome == "failed"
        assert f"which lies in {folder}/ of the device's folder" in report.reason
        with pytest.raises(RecipeError, match="keep it elsewhere"):
            foresee(read_site(device), None)
    assert (home / "b.gguf").is_file()


def test_what_is_seen_of_a_registry_replaces_no_input(device: Path) -> None:
    """Fault: python-tuf makes a link of a file called so."""
    assert update(device, KnowingExaminer(worse)).outcome == "refused"
    root = device.parent / "site" / "registry" / "root.json"
    root.parent.mkdir(exist_ok=True)
    shutil.copy(device.parent / "disease.jsonl", root)
    write_site(device.parent, questions={"disease": "site/registry/root.json"})
    assert "which lies in registry/ of the" in update(device, KnowingExaminer(better)).reason


def test_a_damaged_history_does_not_stop_an_update(device: Path) -> None:
    update(device, KnowingExaminer(better))
    folder = folder_of(device)
    (folder.path / "history").write_bytes(b"\xff" * 16 + b"\n")
    write_site(device.parent, experts=[{"path": "b.gguf"}], promote={"watch": 0, "better": []})
    report = update(device, KnowingExaminer(better))
    assert report.outcome == "promoted"
    assert report.previous == folder.previous() is not None


def test_a_roll_back_that_is_interrupted_says_how_it_ends(device: Path) -> None:
    first = update(device, KnowingExaminer(better)).current
    write_site(device.parent, experts=[{"path": "b.gguf"}], promote={"watch": 0, "better": []})
    update(device, KnowingExaminer(better))

    class Slow(Server):
        def reload(self, *, asks: bool = True) -> None:
            raise KeyboardInterrupt

    server = Slow(ServerPlace("http://127.0.0.1:9"))
    with pytest.raises(KeyboardInterrupt) as caught:
        roll_back_by_hand(
            read_site(device), KnowingExaminer(better), server, reason="odd", by="eve"
        )
    assert caught.value.__notes__ == [
        "the roll back has begun; run edgemerge update, which ends it"
    ]
    assert folder_of(device).current() == first
    report = update(device, KnowingExaminer(better))
    assert (report.outcome, report.reason, report.current) == ("rolled_back", "odd", first)


def test_what_keeps_an_update_from_its_start_is_reported(device: Path) -> None:
    write_site(device.parent, reports="reports")
    with pytest.raises(RecipeError) as caught, reporting(read_site(device)):
        raise RecipeError("no key")
    assert "the report was not written" in caught.value.__notes__[0]
    (device.parent / "reports").mkdir()
    with pytest.raises(RecipeError), reporting(read_site(device)):
        raise RecipeError("no key")
    told = json.loads((device.parent / "reports" / "ward-3.json").read_text())
    assert (told["outcome"], told["reason"]) == ("failed", "no key")
    assert not (device.parent / "site").exists()


def test_a_dry_run_heeds_again(device: Path) -> None:
    update(device, KnowingExaminer(worse))
    site = read_site(device)
    assert foresee(site, None)["does"] == "unchanged"
    assert foresee(site, None, again=True)["does"] == "merges"


class Killed(KnowingExaminer):
    """Its process is ended before it has asked the new model."""

    def ask_all(self, model: Path, sha256: str, show: Show, chunk: int) -> Answers:
        if model.stem not in os.readlink(model.parents[1] / "current.gguf"):
            raise RuntimeFailure("it was killed; the next update asks it again")
        return super().ask_all(model, sha256, show, chunk)


def try_in_vain(device: Path, scale: float) -> str:
    """Merge what nobody gets to decide about, and return its id."""
    merge = {"method": "task_arithmetic", "parameters": {"lambda": scale}, "type": "Q8_0"}
    write_site(device.parent, merge=merge, promote={"watch": 0, "better": []})
    assert update(device, Killed(better)).outcome == "failed"
    return str((folder_of(device).trying() or {})["id"])


def test_models_that_were_not_decided_about_do_not_fill_the_disk(device: Path) -> None:
    """Fault: each stayed for ever, as one that somebody made on the page."""
    update(device, KnowingExaminer(better))
    folder = folder_of(device)
    first = folder.current_id()
    tried = [try_in_vain(device, scale) for scale in (0.2, 0.3, 0.4)]
    assert {one.stem for one in folder.models.glob("*.gguf")} == {first, tried[-1]}
    assert {one.id for one in folder.records()} == {first, tried[-1]}
    assert update(device, KnowingExaminer(better)).outcome == "promoted"  # it goes on with the last
    assert folder.current_id() == tried[-1]
    events = list(read_events(folder.path / "log.jsonl"))
    assert [one["id"] for one in events if one["event"] == "merged"] == [first, *tried]


@pytest.mark.parametrize("with_record", [False, True])
def test_a_model_that_was_here_stays_where_an_update_tries_it(
    device: Path, with_record: bool
) -> None:
    """Fault: an update that merged what somebody had made on the page removed it when it was cut off."""
    update(device, KnowingExaminer(better))
    folder = folder_of(device)
    tried = try_in_vain(device, 0.2)
    model, record = folder.model_path(tried).read_bytes(), folder.record(tried)
    try_in_vain(device, 0.3)
    assert not folder.has_model(tried)
    folder.model_path(tried).write_bytes(model)
    if with_record:
        folder.write_record(record)
    assert try_in_vain(device, 0.2) == tried
    assert try_in_vain(device, 0.2) == tried  # it goes on
    try_in_vain(device, 0.3)
    assert folder.has_model(tried)
    assert folder.record(tried).decision is None


def test_a_model_that_was_here_stays_where_its_promotion_is_cut_off(
    device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update(device, KnowingExaminer(better))
    write_site(device.parent, experts=[{"path": "b.gguf"}], promote={"watch": 0, "better": []})
    update(device, KnowingExaminer(better))
    folder = folder_of(device)
    tried = try_in_vain(device, 0.2)
    (folder.path / "trying.json").unlink()  # now it is as one of the page's

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SiteFolder, "promote", end)
        with pytest.raises(KeyboardInterrupt):
            update(device, KnowingExaminer(better), again=True)
    assert (folder.trying() or {})["step"] == "promote"
    roll_back_by_hand(read_site(device), KnowingExaminer(better), None, reason="odd", by="eve")
    assert folder.has_model(tried)


def test_a_roll_back_by_hand_forgets_what_is_being_tried(device: Path) -> None:
    update(device, KnowingExaminer(better))
    write_site(device.parent, experts=[{"path": "b.gguf"}], promote={"watch": 0, "better": []})
    update(device, KnowingExaminer(better))
    tried = try_in_vain(device, 0.2)
    folder = folder_of(device)
    assert folder.has_model(tried)
    roll_back_by_hand(read_site(device), KnowingExaminer(better), None, reason="odd", by="eve")
    assert [one.stem for one in folder.models.glob("*.gguf")] == [folder.current_id()]
