"""Updates of a device whose model's file was lost, as where a file system was repaired, or by a stray rm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgemerge.fleet.foresight import foresee
from edgemerge.fleet.server import Server
from edgemerge.fleet.site_file import ServerPlace, read_site
from edgemerge.fleet.switch import roll_back_by_hand
from edgemerge.runtime.model_files import find_fingerprint
from edgemerge.site.folder import SiteFolder
from edgemerge.site.log import read_events
from edgemerge.site.record import ModelRecord
from tests.support.updates import (
    KnowingExaminer,
    better,
    folder_of,
    state_of,
    update,
    worse,
    write_site,
)

ANY_GAIN: Mapping[str, Any] = {"watch": 0, "better": []}


class Following(Server):
    """A server that is there, and serves what it was told to load."""

    def __init__(self, current: Path) -> None:
        super().__init__(ServerPlace("http://127.0.0.1:9"))
        self.current, self.reloads, self.served = current, 0, "another"

    def check(self) -> None:
        pass

    def reload(self, *, asks: bool = True) -> None:
        self.reloads += 1
        self.served = find_fingerprint([self.current])

    def find_difference(self, current: Path) -> str | None:
        return None if self.served == find_fingerprint([current]) else "another file"


def promote(device: Path, expert: str = "a") -> ModelRecord:
    write_site(device.parent, experts=[{"path": f"{expert}.gguf"}], promote=ANY_GAIN)
    report = update(device, KnowingExaminer(lambda _: {"disease": 50, "general": 100}))
    assert report.outcome == "promoted", report.reason
    assert report.current is not None
    return report.current


def lose(device: Path) -> None:
    folder = folder_of(device)
    folder.model_path(str(folder.current_id())).unlink()


@pytest.mark.parametrize("with_record", [False, True])
def test_a_model_that_was_lost_is_made_again(device: Path, with_record: bool) -> None:
    """Fault: what was merged anew was thrown away, as the link still named it."""
    record, folder = promote(device), folder_of(device)
    before = state_of(folder)
    lose(device)
    if with_record:
        (folder.models / f"{record.id}.json").unlink()
    assert foresee(read_site(device), None)["does"] == "merges"
    server = Following(folder.current_path)
    report = update(device, KnowingExaminer(better), server=server)
    assert (report.outcome, report.failures) == ("unchanged", [])
    assert report.reason == "the merge gives the model that serves, whose file was lost"
    assert server.reloads == 1
    after = state_of(folder)
    assert {key: after[key] for key in ("serves", "history", "models", "trying", "work")} == {
        key: before[key] for key in ("serves", "history", "models", "trying", "work")
    }
    known = folder.current()
    assert known is not None
    assert (known.decision, known.made_of) == ("promoted", record.made_of)
    assert known == record or with_record
    assert "restored" in [one["event"] for one in read_events(folder.path / "log.jsonl")]
    again = update(device, KnowingExaminer(better), server=server)
    assert again.reason.startswith("nothing changed since")
    assert server.reloads == 1


def test_a_refused_state_is_tried_again_where_the_model_that_serves_is_lost(device: Path) -> None:
    """It is compared with the base, once."""
    promote(device)
    write_site(device.parent, experts=[{"path": "b.gguf"}])
    assert update(device, KnowingExaminer(worse)).outcome == "refused"
    lose(device)
    report = update(device, KnowingExaminer(worse))
    assert report.outcome == "refused"
    assert ["the model that serves is lost" in one for one in report.failures] == [True]
    report = update(device, KnowingExaminer(worse))
    assert report.outcome == "unchanged"
    assert ["the model that serves is lost" in one for one in report.failures] == [True]
    report = update(
        device,
        KnowingExaminer(better),
        again=True,
        server=Following(folder_of(device).current_path),
    )
    assert (report.outcome, report.failures) == ("promoted", [])


@pytest.mark.parametrize("with_record", [False, True])
def test_a_model_that_was_lost_can_be_rolled_back(device: Path, with_record: bool) -> None:
    """Fault: without its record, the roll back failed, and so did each update, which went on with it."""
    first = promote(device)
    second, folder = promote(device, "b"), folder_of(device)
    lose(device)
    if with_record:
        (folder.models / f"{second.id}.json").unlink()
    examiner = KnowingExaminer(better)
    report = roll_back_by_hand(read_site(device), examiner, None, reason="lost", by="eve")
    assert (report.outcome, report.current, report.failures) == ("rolled_back", first, [])
    assert folder.current_path.is_file()
    events = {one["event"]: one for one in read_events(folder.path / "log.jsonl")}
    assert (events["rolled_back"]["id"], events["rolled_back"]["reason"]) == (second.id, "lost")
    report = update(device, examiner)
    assert (report.outcome, report.current) == ("unchanged", first)


def cut_off(device: Path, step: str, right: Callable[[Path], Mapping[str, int]] = better) -> str:
    """Let power go when a step has been noted; return the id of the model that is tried."""

    class Ending(SiteFolder):
        def try_(self, state: Mapping[str, Any]) -> None:
            super().try_(state)
            if state["step"] == step:
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgemerge.fleet.update.SiteFolder", Ending)
        with pytest.raises(KeyboardInterrupt):
            update(device, KnowingExaminer(right))
    return str((folder_of(device).trying() or {})["id"])


@pytest.mark.parametrize("with_record", [False, True])
def test_a_model_that_was_lost_while_it_was_watched_is_rolled_back(
    device: Path, with_record: bool
) -> None:
    """Fault: without its record, each update failed, as it told of it."""
    first, folder = promote(device), folder_of(device)
    write_site(device.parent, experts=[{"path": "b.gguf"}], promote=ANY_GAIN)
    examiner = KnowingExaminer(better)
    assert folder.current_id() == first.id
    tried = cut_off(device, "watch")
    assert folder.current_id() == tried
    lose(device)
    if with_record:
        (folder.models / f"{tried}.json").unlink()
    report = update(device, examiner)
    assert (report.outcome, report.reason) == ("rolled_back", "its file was lost")
    assert (report.current, report.failures) == (first, [])
    assert update(device, examiner).outcome == "unchanged"


def test_a_first_model_that_was_lost_while_it_was_watched_is_made_again(device: Path) -> None:
    """Fault: there was nothing to roll back to, and later updates said that nothing had changed."""
    tried, folder = cut_off(device, "watch"), folder_of(device)
    lose(device)
    report = update(device, KnowingExaminer(better))
    assert (report.outcome, report.failures) == ("unchanged", [])
    assert report.reason == "the merge gives the model that serves, whose file was lost"
    assert folder.serving_id() == tried
    assert update(device, KnowingExaminer(better)).outcome == "unchanged"


@pytest.mark.parametrize("lost", ["gguf", "json"])
def test_a_model_that_was_lost_before_its_promotion_is_made_again(device: Path, lost: str) -> None:
    """Fault: each update failed, as it could not promote what was not there."""
    promote(device)
    write_site(device.parent, experts=[{"path": "b.gguf"}], promote=ANY_GAIN)
    tried, folder = cut_off(device, "promote"), folder_of(device)
    (folder.models / f"{tried}.{lost}").unlink()
    report = update(device, KnowingExaminer(better))
    assert (report.outcome, report.failures) == ("promoted", [])
    assert folder.current_id() == tried
    assert folder.has_model(tried)


def test_a_model_whose_record_was_lost_can_be_refused(device: Path) -> None:
    promote(device)
    write_site(device.parent, experts=[{"path": "b.gguf"}])
    tried, folder = cut_off(device, "refuse", worse), folder_of(device)
    (folder.models / f"{tried}.json").unlink()
    report = update(device, KnowingExaminer(worse))
    assert (report.outcome, report.tried, report.failures) == ("refused", None, [])
    assert not folder.has_model(tried)


def test_a_link_that_was_lost_is_made_again(device: Path) -> None:
    record = promote(device)
    update(device, KnowingExaminer(better), again=True)  # which settles it as unchanged
    folder_of(device).current_path.unlink()
    report = update(device, KnowingExaminer(lambda _: {"disease": 50, "general": 100}))
    assert report.outcome == "promoted"
    assert report.current is not None
    assert replace(report.current, made=record.made) == record
