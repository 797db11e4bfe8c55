"""The folder of a device: whole at any moment, and the same after a power cut at any step."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from edgemerge.errors import FormatError, OutputError, RecipeError, VerificationError
from edgemerge.site.folder import SiteFolder
from edgemerge.site.log import append_event, last_events, read_events
from edgemerge.site.pruning import prune
from edgemerge.site.record import ModelRecord, Part, Score


class PowerCut(BaseException):
    """Ends what runs, as a kill does."""


@pytest.fixture
def site(tmp_path: Path) -> SiteFolder:
    folder = SiteFolder(tmp_path / "site")
    folder.make()
    return folder


def add(site: SiteFolder, text: str) -> str:
    """Add a model whose bytes are a text, and return its id."""
    raw = text.encode()
    sha256 = hashlib.sha256(raw).hexdigest()
    record = ModelRecord(
        id=sha256[:16],
        file=f"models/{sha256[:16]}.gguf",
        sha256=sha256,
        bytes=len(raw),
        made=f"2026-01-01T00:00:0{len(text)}Z",
        made_of=(Part("base", "1", "a" * 64, "base"),),
        method="ties",
        settings={"density": 0.5},
        scores={"disease": Score(3, 4)},
        perplexities={"notes": 7.5},
        speed=12.0,
    )
    file = site.work / "new.gguf"
    file.write_bytes(raw)
    site.add(file, record)
    return record.id


def served(site: SiteFolder) -> str:
    return site.current_path.read_text()


def test_a_record_is_read_as_it_was_written(site: SiteFolder) -> None:
    name = add(site, "one")
    record = site.record(name)
    assert record.made_of == (Part("base", "1", "a" * 64, "base"),)
    assert record.scores == {"disease": Score(3, 4)}
    assert site.records() == [record]
    assert site.current() is None


def test_promotions_and_roll_backs(site: SiteFolder) -> None:
    one, two, three = (add(site, text) for text in ("1", "22", "333"))
    for name in (one, two, three):
        site.promote(name, f"{name} is better")
    assert served(site) == "333"
    assert os.readlink(site.current_path) == f"models/{three}.gguf"
    assert site.history() == [one, two, three]
    assert site.roll_back("it is slow") == two
    assert served(site) == "22"
    assert site.record(three).decision == "rolled_back"
    assert site.record(three).reason == "it is slow"
    assert site.roll_back("by command") == one
    with pytest.raises(OutputError, match="no earlier model"):
        site.roll_back("by command")
    assert [one["event"] for one in site.last_log(9)] == ["promoted"] * 3 + ["rolled_back"] * 2
    site.promote(two, "again")
    assert site.history() == [one, two]


def test_what_was_rolled_back_does_not_come_back(site: SiteFolder) -> None:
    one, two = add(site, "1"), add(site, "22")
    for name in (one, two, one):
        site.promote(name, "better")
    assert site.roll_back("it crashed") == two
    assert site.previous() is None


def test_pruning_leaves_what_serves_and_the_one_before(site: SiteFolder) -> None:
    names = [add(site, "x" * i) for i in range(1, 6)]
    for name in names[:4]:
        site.promote(name, "better")
    assert set(prune(site, 1)) == set(names[:2])  # nobody has decided about the last one
    assert [name for name in names if site.has_model(name)] == names[2:]
    assert len(site.records()) == 4
    with pytest.raises(RecipeError, match="serves"):
        site.drop(names[3])


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("damage", [80, 0, 17], ids=["all", "empty", "the last line"])
def test_pruning_with_a_damaged_history_leaves_the_newest(
    damage: int, keep: int, site: SiteFolder
) -> None:
    names = [add(site, "x" * i) for i in range(1, 6)]
    for name in names:
        site.promote(name, "better")
    history = site.path / "history"
    raw = history.read_bytes()
    history.write_bytes(raw[:-damage] + b"\xff" * damage if damage else b"")
    assert prune(site, keep) == sorted(names[: -max(2, keep)])
    assert [name for name in names if site.has_model(name)] == names[-max(2, keep) :]


SWITCHES: dict[str, Callable[[SiteFolder, str], object]] = {
    "promote": lambda site, name: site.promote(name, "better"),
    "roll_back": lambda site, name: site.roll_back("worse", name),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_power_cut_at_any_step_of_a_switch(
    switch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link leads to a whole model after each call of the system, and done again it ends the same."""
    steps = ("replace", "symlink", "fsync", "unlink", "write", "pwrite")
    real = {step: getattr(os, step) for step in steps}
    left = 0

    def cut(step: str) -> Callable[..., object]:
        def call(*arguments: object, **words: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                raise PowerCut
            return real[step](*arguments, **words)

        return call

    for i_step in range(1, 60):
        site = SiteFolder(tmp_path / f"{i_step}")
        site.make()
        names = [add(site, "1"), add(site, "22"), add(site, "333")]
        for name in names[: 2 if switch == "promote" else 3]:
            site.promote(name, "better")
        left = i_step
        with monkeypatch.context() as patch:
            for step in steps:
                patch.setattr(os, step, cut(step))
            try:
                SWITCHES[switch](site, names[2])
            except PowerCut:
                pass
            else:
                break
        assert served(site) in ("22", "333")
        assert site.history()[-1] == site.current_id()
        site.finish()
        SWITCHES[switch](site, names[2])
        assert served(site) == ("333" if switch == "promote" else "22")
        assert site.history() == names[: 3 if switch == "promote" else 2]
        events = list(read_events(site.path / "log.jsonl"))
        done = {"promote": "promoted", "roll_back": "rolled_back"}[switch]
        assert [one["event"] for one in events if one.get("id") == names[2]][-1] == done
        n_events = 3 if switch == "promote" else 4
        assert len([one for one in events if one["event"] != "repaired"]) == n_events
    assert i_step > 8


def test_two_processes_do_not_change_it_at_once(site: SiteFolder) -> None:
    other = SiteFolder(site.path)
    with site.locked(), pytest.raises(OutputError, match="another update"), other.locked():
        pass
    with other.locked():
        pass


def test_a_damaged_record_is_named(site: SiteFolder) -> None:
    name = add(site, "one")
    path = site.models / f"{name}.json"
    document = json.loads(path.read_text())
    for key, value in (("bytes", "3"), ("decision", "yes"), ("scores", {"disease": 3})):
        path.write_text(json.dumps({**document, key: value}))
        with pytest.raises(FormatError, match=key):
            site.record(name)
    path.write_text(json.dumps({**document, "sha256": "f" * 64}))
    with pytest.raises(FormatError, match="id"):
        site.record(name)
    path.write_text(json.dumps({"id": name}))
    with pytest.raises(FormatError, match="lacks"):
        site.record(name)


def test_what_a_bad_card_damages_does_not_stop_a_device(site: SiteFolder) -> None:
    one, two = add(site, "1"), add(site, "22")
    site.promote(one, "better")
    site.promote(two, "better")
    for name in (one, two):
        (site.models / f"{name}.json").write_text("{")
    (site.path / "trying.json").write_text("{")
    assert site.trying() is None
    assert site.records() == []
    site.finish()
    assert site.current() == site.record(two)
    assert site.record(two).reason.startswith("its record was damaged")
    assert [one["event"] for one in site.last_log(9)] == ["promoted", "promoted", "repaired"]
    site.model_path(two).write_text("23")
    (site.models / f"{two}.json").write_text("{")
    with pytest.raises(FormatError, match="is damaged, and so is its record"):
        site.finish()


def test_a_torn_last_line_is_cut_off_and_said(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    append_event(path, {"event": "one"})
    append_event(path, {"event": "two"})
    for torn in (b'{"event": "th', b"\0\0\0\0", b'{"event": "three"}', b"\0\n"):
        whole = path.read_bytes()
        path.write_bytes(whole + torn)
        assert [one["event"] for one in read_events(path)][:2] == ["one", "two"]
        append_event(path, {"event": "next"})
        assert path.read_bytes().startswith(whole)
        assert [one["event"] for one in last_events(path, 2)] == ["repaired", "next"]
    assert [one["event"] for one in read_events(path)] == ["one", "two"] + ["repaired", "next"] * 4


def test_a_line_that_was_changed_or_taken_out_shows(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for number in range(4):
        append_event(path, {"event": "refused", "right": number})
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[1].replace('"right": 1', '"right": 9'), *lines[2:]]))
    with pytest.raises(VerificationError, match="line 3"):
        list(read_events(path))
    path.write_text("".join([lines[0], *lines[2:]]))
    with pytest.raises(VerificationError, match="line 2"):
        list(read_events(path))


def test_the_newest_events_of_a_long_log(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for number in range(30):
        append_event(path, {"event": "x" * 9000, "number": number})
    assert [one["number"] for one in last_events(path, 20)] == list(range(10, 30))
    assert len(last_events(path, 99)) == 30
