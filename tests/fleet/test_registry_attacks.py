"""What a mirror, a stick or a thief of keys may do to a registry: each is refused by one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from edgemerge.errors import EdgemergeError, FormatError, VerificationError
from edgemerge.fleet.registry.publishing import refresh, remove
from tests.support.bounded import bounded
from tests.support.registries import NOW, Site, edit, ignore

DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Site:
    site = Site(tmp_path_factory.mktemp("made"))
    site.publish("ward", "1", seed=1)
    site.publish("lab", "1", seed=2)
    return site


@pytest.fixture
def site(made: Site, tmp_path: Path) -> Site:
    return made.copy(tmp_path / "site")


def stored(folder: Path, name: str) -> Path:
    return next((folder / "targets" / name).rglob("*.gguf"))


def metadata(folder: Path, role: str) -> Path:
    """The newest file of a role."""
    found = (folder / "metadata").glob(f"*{role}.json")
    return max(
        found, key=lambda path: int(path.name.partition(".")[0]) if role != "timestamp" else 0
    )


def refused(act: Callable[[], object], words: str) -> str:
    """Check that one sentence refuses."""
    with pytest.raises(EdgemergeError, match=words) as caught:
        act()
    said = str(caught.value)
    assert "\n" not in said
    assert "Traceback" not in said
    return said


# -- files -------------------------------------------------------------------------------------------


def test_a_tampered_delta_is_refused_and_never_gets_its_name(site: Site, tmp_path: Path) -> None:
    path = stored(site.path, "ward")
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    there = site.reader()
    refused(
        lambda: there.fetch(there.find("ward"), tmp_path / "got", ignore), "is not the file that"
    )
    assert list((tmp_path / "got").iterdir()) == []


def test_a_delta_cut_short_on_the_mirror_is_refused(site: Site, tmp_path: Path) -> None:
    path = stored(site.path, "ward")
    path.write_bytes(path.read_bytes()[:-1000])
    there = site.reader()
    refused(lambda: there.fetch(there.find("ward"), tmp_path / "got", ignore), "cut short, damaged")
    assert list((tmp_path / "got").iterdir()) == []


def test_swapped_names_are_refused(site: Site, tmp_path: Path) -> None:
    """The mirror gives one signed file under another's name."""
    shutil.copy(stored(site.path, "lab"), stored(site.path, "ward"))
    there = site.reader()
    refused(
        lambda: there.fetch(there.find("ward"), tmp_path / "got", ignore), "is not the file that"
    )


def test_names_swapped_in_the_index_break_its_signature(site: Site) -> None:
    def swap(signed: dict[str, Any]) -> None:
        targets = signed["targets"]
        ward, lab = sorted(targets)
        targets[ward], targets[lab] = targets[lab], targets[ward]

    edit(metadata(site.path, "targets"), swap)
    refused(site.reader().refresh, "is larger than it may be|is not the file that the index names")


def test_an_entry_that_the_index_does_not_name_is_not_fetched(site: Site, tmp_path: Path) -> None:
    ward = site.reader().find("ward")
    remove(site.at(NOW), "ward", "1")
    there = site.reader()
    refused(lambda: there.fetch(ward, tmp_path, ignore), "is not what the index names")


# -- old indexes -------------------------------------------------------------------------------------


def test_an_old_index_is_refused_where_a_newer_one_was_seen(site: Site) -> None:
    old = site.mirror("old")
    site.publish("ward", "2", seed=3)
    there = site.reader()
    there.refresh()
    assert there.find("ward").version == "2"
    refused(site.reader(old).refresh, "is older than what this machine has seen")
    assert site.reader().find("ward").version == "2"  # what was known is still known


def test_an_old_index_is_past_its_date_for_who_sees_it_first(site: Site) -> None:
    """A mirror that freezes is found out by the dates."""
    old = site.mirror("old")
    refresh(site.at(NOW + 60 * DAY))
    later = NOW + 91 * DAY
    said = refused(site.reader(old, now=later, state="new").refresh, "is past its date")
    assert "timestamp.json" in said
    site.reader(now=later).refresh()


def test_a_root_past_its_date_is_refused(site: Site) -> None:
    refresh(site.at(NOW + 731 * DAY))
    assert "root.json" in refused(site.reader(now=NOW + 732 * DAY).refresh, "is past its date")


@pytest.mark.parametrize("role", ["targets", "snapshot"])
def test_an_index_past_its_date_is_refused_under_a_fresh_timestamp(role: str, site: Site) -> None:
    """A key that may only refresh cannot make the rest last."""
    refresh(site.at(NOW, lasts=timedelta(days=5)))
    path = metadata(site.path, "timestamp")
    edit(path, lambda signed: signed.update(expires="2027-01-01T00:00:00Z"), site.key("publisher"))
    if role == "targets":
        snapshot = metadata(site.path, "snapshot")
        key = site.key("publisher")
        edit(snapshot, lambda signed: signed.update(expires="2027-01-01T00:00:00Z"), key)
        raw = snapshot.read_bytes()
        edit(path, lambda signed: signed["meta"]["snapshot.json"].update(describe(raw)), key)
    assert role in refused(site.reader(now=NOW + 9 * DAY).refresh, "is past its date")


def describe(raw: bytes) -> dict[str, Any]:
    import hashlib

    return {"length": len(raw), "hashes": {"sha256": hashlib.sha256(raw).hexdigest()}}


@pytest.mark.parametrize("role", ["targets", "snapshot"])
def test_versions_do_not_mix(role: str, site: Site) -> None:
    old = metadata(site.path, role).read_bytes()
    site.publish("ward", "2", seed=3)
    metadata(site.path, role).write_bytes(old)
    refused(site.reader().refresh, "is not the file that the index names")


@pytest.mark.parametrize(
    "name", ["timestamp.json", "3.snapshot.json", "3.targets.json", "1.root.json"]
)
def test_a_missing_file_is_named(name: str, site: Site) -> None:
    mirror = site.mirror("mirror")
    (mirror / "metadata" / name).unlink()
    if name == "1.root.json":  # which the reader has
        site.reader(mirror).refresh()
    else:
        assert name in refused(site.reader(mirror).refresh, "is not there")


# -- forgeries ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_metadata_signed_by_a_strangers_key_are_refused(role: str, site: Site) -> None:
    path = metadata(site.path, role)
    edit(path, lambda signed: signed.update(version=signed["version"]), site.key("stranger"))
    words = (
        "is not signed by enough" if role == "timestamp" else "is not the file that the index names"
    )
    refused(site.reader().refresh, words)


def test_a_changed_timestamp_is_refused(site: Site) -> None:
    edit(metadata(site.path, "timestamp"), lambda signed: signed.update(version=9))
    refused(site.reader().refresh, "is not signed by enough")


def test_a_root_that_the_old_root_did_not_sign_is_refused(site: Site) -> None:
    raw = json.loads(site.root.read_text())
    path = site.root.with_name("2.root.json")
    path.write_text(json.dumps(raw))
    edit(path, lambda signed: signed.update(version=2), site.key("stranger"))
    assert "2.root.json" in refused(site.reader().refresh, "is not signed by enough")


def test_a_root_that_leaves_a_version_out_is_refused(site: Site) -> None:
    path = site.root.with_name("2.root.json")
    path.write_bytes(site.root.read_bytes())
    edit(path, lambda signed: signed.update(version=3), site.key("root"))
    refused(site.reader().refresh, "is of another version than the rest")


def test_another_registrys_root_does_not_trust_this_one(site: Site, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Site(tmp_path / "other")
    site.root = other.root
    refused(site.reader().refresh, "is not signed by enough")


@pytest.mark.parametrize("raw", [b"", b"{}", b"\xff" * 100, b"[" * 5000, b'{"signed":1e999}'])
def test_a_trusted_root_must_be_one(raw: bytes, site: Site, tmp_path: Path) -> None:
    site.root = tmp_path / "root.json"
    site.root.write_bytes(raw)
    refused(site.reader().refresh, "is no root of a registry")


def test_other_metadata_are_no_root(site: Site) -> None:
    site.root = metadata(site.path, "timestamp")
    refused(site.reader().refresh, "is timestamp metadata; give the registry's root")


# -- hostile indexes ---------------------------------------------------------------------------------

HOSTILE = {
    "empty": b"",
    "no JSON": b"\x00\xff" * 64,
    "deep": b"[" * 100_000,
    "a huge number": b'{"signed": ' + b"9" * 100_000 + b"}",
    "many values": b"[" + b"1," * 8000 + b"1]",
    "no signatures": b'{"signed": {"_type": "timestamp"}, "signatures": []}',
    "another type": b'{"signed": {"_type": "mirrors"}, "signatures": []}',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_timestamp_is_refused(name: str, site: Site) -> None:
    metadata(site.path, "timestamp").write_bytes(HOSTILE[name])
    there = site.reader()
    words = "is no metadata that can be read|is larger than it may be"
    bounded(lambda: refused(there.refresh, words))


@pytest.mark.parametrize("role", ["timestamp", "targets"])
def test_an_endless_index_is_refused_before_it_is_read(role: str, site: Site) -> None:
    with metadata(site.path, role).open("r+b") as file:
        file.truncate(1 << 40)
    refused(site.reader().refresh, "is larger than")


def publish_signed(site: Site, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the index as a publisher does who writes whatever it likes."""
    folder = site.at(NOW)
    with folder.locked():
        draft = folder.read()
        document = draft.targets.to_dict()
        change(document["targets"])
        document = json.loads(json.dumps(document))  # no two entries are one object
        draft.targets = type(draft.targets).from_dict(document)
        folder.write(draft)


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a path that leads out": lambda t: t.update(
        {"../../etc/passwd": t["ward/1/ward-1.delta.gguf"]}
    ),
    "an absolute path": lambda t: t.update({"/etc/1/x.gguf": t["ward/1/ward-1.delta.gguf"]}),
    "another file name": lambda t: t.update({"ward/1/x.gguf": t["ward/1/ward-1.delta.gguf"]}),
    "a version that is none": lambda t: t.update({"ward/01/w": t["ward/1/ward-1.delta.gguf"]}),
    "no custom": lambda t: t["ward/1/ward-1.delta.gguf"].pop("custom"),
    "custom that is a list": lambda t: t["ward/1/ward-1.delta.gguf"].update(custom=[1]),
    "an unknown kind": lambda t: t["ward/1/ward-1.delta.gguf"]["custom"].update(kind="program"),
    "no base": lambda t: t["ward/1/ward-1.delta.gguf"]["custom"].update(base=None),
    "a base that is no text": lambda t: t["ward/1/ward-1.delta.gguf"]["custom"].update(base=7),
    "a licence that moves the cursor": lambda t: t["ward/1/ward-1.delta.gguf"]["custom"].update(
        licence="\x1b[2J"
    ),
    "a time that is none": lambda t: t["ward/1/ward-1.delta.gguf"]["custom"].update(
        published="now"
    ),
    "scores that are a list": lambda t: t["ward/1/ward-1.delta.gguf"]["custom"].update(scores="[]"),
    "scores without an end": lambda t: t["ward/1/ward-1.delta.gguf"]["custom"].update(
        scores='{"a": 1e999}'
    ),
    "scores too deep": lambda t: t["ward/1/ward-1.delta.gguf"]["custom"].update(scores="[" * 9000),
    "long scores": lambda t: t["ward/1/ward-1.delta.gguf"]["custom"].update(
        scores=f'{{"a": "{"x" * 20000}"}}'
    ),
    "no SHA-256": lambda t: t["ward/1/ward-1.delta.gguf"].update(hashes={"sha512": "00" * 64}),
    "no bytes": lambda t: t["ward/1/ward-1.delta.gguf"].update(length=0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_hostile_entry_is_left_out_though_it_is_signed(name: str, site: Site) -> None:
    """And so is what a newer edgemerge publishes: all else is still there for older ones."""
    before = site.reader().entries()
    publish_signed(site, CHANGES[name])
    there = site.reader()
    assert there.find("lab") in before
    assert all(entry in before for entry in there.entries())
    note = there.note()
    assert note is not None
    assert "that edgemerge does not write so" in note
    assert note.endswith("; entries left out: 1")


def test_what_is_left_out_is_named_where_it_is_wanted(site: Site) -> None:
    assert site.reader().note() is None
    publish_signed(site, CHANGES["an unknown kind"])
    words = "'ward/1/ward-1.delta.gguf' that edgemerge does not write so"
    with pytest.raises(FormatError, match=words):
        site.reader().find("ward")
    site.publish("ward", "2")
    assert site.reader().find("ward").version == "2"
    with pytest.raises(FormatError, match=words):
        site.reader().find("ward", "1")
    publish_signed(site, lambda t: t["lab/1/lab-1.delta.gguf"].pop("custom"))
    there = site.reader()
    assert [entry.version for entry in there.entries()] == ["2"]
    assert str(there.note()).endswith("; entries left out: 2")


def test_a_file_that_is_larger_than_signed_is_not_read_on(site: Site, tmp_path: Path) -> None:
    path = stored(site.path, "ward")
    with path.open("ab") as file:
        file.truncate(1 << 40)
    there = site.reader()
    got = there.fetch(there.find("ward"), tmp_path / "got", ignore)
    assert got.stat().st_size == there.find("ward").n_bytes


def test_a_stolen_publishers_key_does_not_change_keys(site: Site) -> None:
    """Nor does it get past a rotation; see test_registry_keys."""
    path = site.root.with_name("2.root.json")
    path.write_bytes(site.root.read_bytes())
    edit(path, lambda signed: signed.update(version=2), site.key("publisher"))
    with pytest.raises(VerificationError, match="is not signed by enough"):
        site.reader().refresh()
