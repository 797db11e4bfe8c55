"""Updates from a registry of signed files."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("tuf")

from edgemerge.cli import make_app
from edgemerge.errors import MismatchError
from edgemerge.fleet.foresight import foresee
from edgemerge.fleet.registry import offers
from edgemerge.fleet.registry.client import Registry
from edgemerge.fleet.registry.folder import RegistryFolder
from edgemerge.fleet.registry.keys import read_signers
from edgemerge.fleet.registry.publishing import Asked, publish, remove
from edgemerge.fleet.registry.roots import Keys, create
from edgemerge.fleet.report import Report
from edgemerge.fleet.site_file import read_site
from edgemerge.merging.delta import DeltaSettings, make_delta
from edgemerge.provenance.keys import create_keys, key_id, read_public_key
from tests.support.updates import (
    KnowingExaminer,
    better,
    folder_of,
    update,
    write_device,
    write_site,
)


class Publisher:
    """A registry in a folder, and the one who publishes there."""

    def __init__(self, folder: Path) -> None:
        (folder / "keys").mkdir()
        root, _ = create_keys(folder / "keys" / "root")
        self._private, public = create_keys(folder / "keys" / "publisher")
        self.key = key_id(read_public_key(public))
        self._place, self._state = folder / "registry", folder / "publisher-state"
        shutil.copy(create(self._open(), Keys(read_signers([root]))), folder / "root.json")

    def _open(self) -> RegistryFolder:
        signers = read_signers([self._private])
        return RegistryFolder(self._place, signers, timedelta(days=9), state=self._state)

    def publish(self, file: Path, name: str, version: str) -> None:
        publish(self._open(), file, Asked(name, version, "MIT", None, {}), lambda *_: None)

    def remove(self, name: str, version: str) -> None:
        remove(self._open(), name, version)


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return Publisher(tmp_path)


DECLARED: dict[str, Any] = {
    "registry": {"address": "registry", "trust": "root.json"},
    "base": {"name": "tiny", "version": 1},
    "experts": [{"name": "disease", "weight": 0.5}],
    "promote": {"watch": 0, "better": []},
}


@pytest.fixture
def device(tmp_path: Path, publisher: Publisher) -> Path:
    return write_device(tmp_path, **DECLARED)


def write_registry_site(device: Path, **changes: Any) -> None:
    write_site(device.parent, **{**DECLARED, **changes})


def run(path: Path, *, again: bool = False) -> Report:
    site = read_site(path)
    assert site.registry is not None
    registry = Registry(site.registry.address, site.registry.trust, folder_of(path).registry)
    return update(path, KnowingExaminer(better), registry=registry, again=again)


def test_the_newest_delta_of_a_registry(device: Path, publisher: Publisher) -> None:
    folder = device.parent
    failed = run(device)
    assert (failed.outcome, failed.reason) == (
        "failed",
        "the registry has no 'tiny'; it is empty",
    )
    publisher.publish(folder / "base.gguf", "tiny", "1")
    for version, expert in (("1", "a"), ("2", "b")):
        delta = folder / f"{expert}.delta.gguf"
        make_delta(folder / "base.gguf", folder / f"{expert}.gguf", delta, DeltaSettings(bits=4))
        publisher.publish(delta, "disease", version)
        if version == "1":
            first = run(device)
    assert (first.outcome, first.versions) == ("promoted", {"tiny": "1", "disease": "1"})
    assert first.current is not None
    assert [part.role for part in first.current.made_of] == ["base", "delta"]
    assert first.current.signed_by == publisher.key
    assert first.bytes_fetched == sum(
        one.stat().st_size for one in (folder / "base.gguf", folder / "a.delta.gguf")
    )
    told = foresee_of(device)
    assert (told["does"], told["merge"]) == ("merges", None)
    assert told["fetch_bytes"] == (folder / "b.delta.gguf").stat().st_size
    second = run(device)
    assert (second.outcome, second.versions["disease"]) == ("promoted", "2")
    names = sorted(path.name for path in folder_of(device).inputs.iterdir())
    assert names == ["disease-2.delta.gguf", "tiny-1.gguf"]
    assert (run(device).outcome, foresee_of(device)["does"]) == ("unchanged", "unchanged")


def publish_delta(publisher: Publisher, folder: Path, base: str, expert: str, name: str) -> str:
    """Publish what an expert changed of a base; return the base's checksum."""
    delta = folder / f"{name}.delta.gguf"
    make_delta(folder / f"{base}.gguf", folder / f"{expert}.gguf", delta, DeltaSettings(bits=4))
    publisher.publish(delta, name, "1")
    return offers.base_checksum(folder / f"{base}.gguf")


def refuses_without_bytes(device: Path, says: str) -> None:
    with pytest.raises(MismatchError) as error:
        foresee_of(device)
    assert str(error.value) == f"{device}: {says}"
    report = run(device)
    assert (report.outcome, report.reason) == ("failed", str(error.value))
    assert (report.bytes_fetched, list(folder_of(device).inputs.iterdir())) == (0, [])


@pytest.mark.parametrize("by_path", [True, False])
def test_a_delta_of_another_base_is_found_before_it_comes(
    device: Path, publisher: Publisher, by_path: bool
) -> None:
    folder = device.parent
    publisher.publish(folder / "base.gguf", "tiny", "1")
    theirs = publish_delta(publisher, folder, "b", "a", "disease")
    ours = offers.base_checksum(folder / "base.gguf")
    if by_path:
        write_registry_site(device, base={"path": "base.gguf"})
    refuses_without_bytes(
        device,
        f"experts: disease 1 is a delta of another base than {'base.gguf' if by_path else 'tiny 1'}: the "
        f"checksums are {theirs} and {ours}; name deltas of one base, and that base",
    )


def test_deltas_of_two_bases_are_found_before_they_come(
    device: Path, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = device.parent
    with monkeypatch.context() as patch:  # as registries were that state no checksum of a model
        offer = offers.read_offer(folder / "base.gguf")._replace(base=None)
        patch.setattr("edgemerge.fleet.registry.publishing.read_offer", lambda *_: offer)
        publisher.publish(folder / "base.gguf", "tiny", "1")
    ours = publish_delta(publisher, folder, "base", "a", "disease")
    theirs = publish_delta(publisher, folder, "b", "a", "other")
    write_registry_site(
        device, experts=[{"name": "disease", "weight": 0.5}, {"name": "other", "weight": 0.5}]
    )
    refuses_without_bytes(
        device,
        "experts: other 1 is a delta of another base than that of disease 1: the checksums are "
        f"{theirs} and {ours}; name deltas of one base, and that base",
    )


def foresee_of(path: Path) -> dict[str, Any]:
    site = read_site(path)
    assert site.registry is not None
    state = path.parent / "state-of-dry-runs"
    return foresee(site, Registry(site.registry.address, site.registry.trust, state))


def test_a_registry_that_is_set_back_or_damaged_changes_nothing(
    device: Path, publisher: Publisher
) -> None:
    folder = device.parent
    publisher.publish(folder / "base.gguf", "tiny", "1")
    publisher.publish(folder / "a.gguf", "disease", "1")
    run(device)
    shutil.copytree(folder / "registry", folder / "yesterday")
    publisher.publish(folder / "b.gguf", "disease", "2")
    second = run(device).current
    (folder / "registry").rename(folder / "today")
    assert run(device).outcome == "failed"  # the stick is not there
    (folder / "yesterday").rename(folder / "registry")
    set_back = run(device)
    assert (set_back.outcome, set_back.current) == ("failed", second)
    (folder / "registry").rename(folder / "yesterday")
    (folder / "today").rename(folder / "registry")
    fetched = folder_of(device).inputs / "disease-2.gguf"
    fetched.write_bytes(bytes(fetched.stat().st_size))  # a card that fails: it is fetched again
    again = run(device, again=True)
    assert (again.outcome, again.current) == ("unchanged", second)
    assert fetched.read_bytes() == (folder / "b.gguf").read_bytes()


def test_an_entry_of_a_newer_edgemerge_stops_no_device(
    device: Path, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = device.parent
    publisher.publish(folder / "base.gguf", "tiny", "1")
    publisher.publish(folder / "a.gguf", "disease", "1")
    with monkeypatch.context() as patch:
        patch.setattr("edgemerge.fleet.registry.publishing.custom_of", lambda _: {"kind": "new"})
        publisher.publish(folder / "b.gguf", "disease", "2")
    said = CliRunner().invoke(make_app(), ["update", str(device), "--dry-run"])
    assert (said.exit_code, "disease  1 " in said.output) == (0, True), said.output
    assert "has an entry 'disease/2/disease-2.gguf' that edgemerge does not" in said.stderr
    assert run(device).versions == {"tiny": "1", "disease": "1"}
