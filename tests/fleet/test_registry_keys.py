"""Keys of a registry are changed by the root alone, without a moment in which readers are refused."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from edgemerge.errors import EdgemergeError, OutputError, RecipeError, VerificationError
from edgemerge.fleet.registry import folder as folders
from edgemerge.fleet.registry import roots
from edgemerge.fleet.registry.publishing import Asked, publish, refresh
from edgemerge.fleet.registry.roots import Keys, create, rotate
from tests.support.registries import NOW, Site, ignore, write_delta

DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Site:
    site = Site(tmp_path_factory.mktemp("made"))
    site.publish()
    return site


@pytest.fixture
def site(made: Site, tmp_path: Path) -> Site:
    return made.copy(tmp_path / "site")


def name_of(site: Site, key: str) -> str:
    return site.key(key).public_key.keyid


def read_between(site: Site, monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Read as a machine that knows the registry and as a new one, after each file that gets its name."""
    seen: list[str | None] = []
    place = folders.RegistryFolder._place

    def place_and_read(self: folders.RegistryFolder, name: str, raw: bytes) -> None:
        place(self, name, raw)
        for state in ("state", f"new-{len(seen)}"):
            try:
                site.reader(state=state).refresh()
                seen.append(None)
            except EdgemergeError as error:
                seen.append(str(error))

    monkeypatch.setattr(folders.RegistryFolder, "_place", place_and_read)
    return seen


def test_a_rotation_that_the_old_key_signs_too_refuses_nobody(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.reader().refresh()
    seen = read_between(site, monkeypatch)
    retired = frozenset({name_of(site, "publisher")})
    rotate(site.at(NOW, "new", "publisher"), Keys([site.key("root")], retired=retired))
    assert len(seen) == 8
    assert set(seen) == {None}
    with pytest.raises(RecipeError, match="may not sign here"):
        site.publish("ward", "2")
    publish(site.at(NOW, "new"), site.folder / "file.gguf", Asked("ward", "2"), ignore)
    there = site.reader()
    assert there.find("ward").publisher == name_of(site, "new")
    there.fetch(there.find("ward", "1"), site.folder / "got", ignore)


def test_a_lost_key_is_replaced_without_it(site: Site) -> None:
    site.reader().refresh()
    retired = frozenset({name_of(site, "publisher")})
    rotate(site.at(NOW, "new"), Keys([site.key("root")], retired=retired))
    for state in ("state", "new"):
        assert site.reader(state=state).find("ward").version == "1"


def test_what_a_retired_key_signs_is_refused(site: Site) -> None:
    """A thief has the old key, and a copy of the registry before the rotation."""
    stolen = site.copy(site.folder / "thief")
    stolen.publish("ward", "9")
    retired = frozenset({name_of(site, "publisher")})
    rotate(site.at(NOW, "new"), Keys([site.key("root")], retired=retired))
    site.reader().refresh()
    with pytest.raises(VerificationError, match="is not signed by enough"):
        site.reader(stolen.path).refresh()


def test_a_rotation_that_is_killed_is_done_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the old key the new root has no index for a moment; the same command again mends it."""
    site.reader().refresh()
    place = folders.RegistryFolder._place

    def place_or_die(self: folders.RegistryFolder, name: str, raw: bytes) -> None:
        if name == "timestamp.json":
            raise KeyboardInterrupt
        place(self, name, raw)

    keys = Keys([site.key("root")], retired=frozenset({name_of(site, "publisher")}))
    with monkeypatch.context() as patch:
        patch.setattr(folders.RegistryFolder, "_place", place_or_die)
        with pytest.raises(KeyboardInterrupt):
            rotate(site.at(NOW, "new"), keys)
    with pytest.raises(VerificationError, match="is not signed by enough"):
        site.reader(state="other").refresh()
    rotate(site.at(NOW, "new"), keys)
    assert site.reader().find("ward").version == "1"
    assert not {name_of(site, "publisher")} & set(site.at(NOW, "new").read().root.keys)


def test_a_root_key_is_replaced(site: Site) -> None:
    site.reader().refresh()
    retired = frozenset({name_of(site, "root")})
    rotate(site.at(NOW), Keys([site.key("root")], [site.key("root-2")], retired=retired))
    with pytest.raises(RecipeError, match="may not sign here"):
        rotate(site.at(NOW), Keys([site.key("root")]))
    rotate(site.at(NOW), Keys([site.key("root-2")]))
    site.reader().refresh()  # which knows the first root and its own state
    site.reader(state="new").refresh()  # and by the first root alone
    assert site.at(NOW).read().root.version == 3


def test_a_root_is_renewed_before_it_is_past_its_date(site: Site) -> None:
    later = NOW + 700 * DAY
    rotate(site.at(later), Keys([site.key("root")]))
    site.reader(now=later + 60 * DAY).refresh()


def test_a_publishers_key_is_no_root_key(site: Site) -> None:
    with pytest.raises(RecipeError, match=r"may not sign here.* with --root-key"):
        rotate(site.at(NOW, "new"), Keys([site.key("publisher")]))


@pytest.mark.parametrize(
    ("retired", "words"),
    [
        ("publisher", "the role targets would have 0 keys"),
        ("root", "the role root would have 0 keys"),
    ],
)
def test_a_role_keeps_a_key(retired: str, words: str, site: Site) -> None:
    with pytest.raises(RecipeError, match=words):
        rotate(site.at(NOW), Keys([site.key("root")], retired=frozenset({name_of(site, retired)})))
    site.reader().refresh()


def test_two_keys_may_be_asked_for(tmp_path: Path) -> None:
    site = Site(tmp_path, makes=False)
    create(site.at(NOW, "publisher", "second"), Keys([site.key("root")], threshold=2))
    file = write_delta(tmp_path / "file.gguf")
    with pytest.raises(
        RecipeError, match="asks for 2 signatures and 1 keys are given; repeat --key"
    ):
        publish(site.at(NOW), file, Asked("ward", "1"), ignore)
    with pytest.raises(RecipeError, match="asks for 2 signatures"):
        publish(site.at(NOW, "publisher", "publisher"), file, Asked("ward", "1"), ignore)
    publish(site.at(NOW, "publisher", "second"), file, Asked("ward", "1"), ignore)
    assert site.reader().find("ward").version == "1"


def test_a_refresher_signs_beside_fewer_publishers_than_are_asked_for(tmp_path: Path) -> None:
    site = Site(tmp_path, makes=False)
    refresher = site.key("refresher").public_key
    keys = Keys([site.key("root")], threshold=2, refreshers=[refresher])
    create(site.at(NOW, "publisher", "second"), keys)
    folder = site.at(NOW + DAY, "publisher", "refresher")
    refresh(folder)
    assert folder.until == NOW + 90 * DAY  # of the index, which is not signed anew
    folder = site.at(NOW + DAY, "publisher", "second", "refresher")
    refresh(folder)
    assert folder.until == NOW + 91 * DAY
    with pytest.raises(RecipeError, match="asks for 2 signatures and 1 keys are given"):
        refresh(site.at(NOW + DAY, "publisher"))
    site.reader(now=NOW + DAY).refresh()


def test_more_signatures_than_keys_are_not_asked_for(tmp_path: Path) -> None:
    site = Site(tmp_path, makes=False)
    with pytest.raises(RecipeError, match="would have 1 keys, and 2 signatures are asked for"):
        create(site.at(NOW), Keys([site.key("root")], threshold=2))
    assert not site.path.exists()


def test_a_key_that_refreshes_does_nothing_else(site: Site) -> None:
    refresher = site.key("refresher").public_key
    rotate(site.at(NOW), Keys([site.key("root")], refreshers=[refresher]))
    refresh(site.at(NOW, lasts=400 * DAY))
    refresh(site.at(NOW, "refresher", lasts=7 * DAY))
    later = NOW + 8 * DAY
    with pytest.raises(VerificationError, match="is past its date"):
        site.reader(now=later).refresh()
    refresh(site.at(later, "refresher", lasts=7 * DAY))
    site.reader(now=later).refresh()
    acts: list[Callable[[], Any]] = [
        lambda: publish(
            site.at(later, "refresher"), site.folder / "file.gguf", Asked("w", "1"), ignore
        ),
        lambda: rotate(site.at(later, "refresher"), Keys([site.key("refresher")])),
    ]
    for act in acts:
        with pytest.raises(RecipeError, match="may not sign here"):
            act()


def test_a_key_that_refreshes_states_the_date_that_readers_keep_to(site: Site) -> None:
    """The index lasts 90 days, and its publisher alone makes it last longer."""
    rotate(site.at(NOW), Keys([site.key("root")], refreshers=[site.key("refresher").public_key]))
    folder = site.at(NOW + 80 * DAY, "refresher", lasts=90 * DAY)
    refresh(folder)
    assert folder.until == folder.index_until == NOW + 90 * DAY
    site.reader(now=folder.until - timedelta(seconds=1)).refresh()
    with pytest.raises(VerificationError, match="is past its date"):
        site.reader(now=folder.until + timedelta(seconds=1)).refresh()
    with pytest.raises(
        RecipeError, match=r"until 2026-08-30, .* give publish --refresh a publisher"
    ):
        refresh(site.at(NOW + 91 * DAY, "refresher"))
    folder = site.at(NOW + 91 * DAY, "refresher", "publisher")  # both: the publisher's key counts
    refresh(folder)
    assert folder.until == NOW + 181 * DAY
    site.reader(now=NOW + 180 * DAY).refresh()


def test_the_root_is_made_where_the_publishers_key_is_not(tmp_path: Path) -> None:
    site = Site(tmp_path, makes=False)
    public = site.key("publisher").public_key
    offline = folders.RegistryFolder(site.path, [], DAY, state=tmp_path / "state-of-root", now=NOW)
    create(offline, Keys([site.key("root")], publishers=[public]))
    assert [path.name for path in (site.path / "metadata").iterdir()] == ["1.root.json"]
    with pytest.raises(VerificationError, match=r"timestamp\.json: is not there"):
        site.reader().refresh()
    site.publish()
    assert site.reader().find("ward").version == "1"


def test_a_registry_that_a_full_disk_left_empty_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: --init took the empty folder for a registry, and --rotate did not find its root."""
    site = Site(tmp_path, makes=False)

    def refuse(path: Path, _raw: bytes) -> None:
        raise OutputError("needs 2 KiB and the disk is full", path=path)

    with monkeypatch.context() as patched:
        patched.setattr(roots, "write_file", refuse)
        with pytest.raises(OutputError, match="the disk is full"):
            create(site.at(NOW), Keys([site.key("root")]))
    assert list((site.path / "metadata").iterdir()) == []
    with pytest.raises(OutputError, match="is no registry; make one with publish --init"):
        rotate(site.at(NOW), Keys([site.key("root")]))
    create(site.at(NOW), Keys([site.key("root")]))
    site.publish()
    assert site.reader().find("ward").version == "1"


def test_a_registry_is_made_once(site: Site) -> None:
    with pytest.raises(EdgemergeError, match="is a registry already; see publish --rotate"):
        create(site.at(NOW), Keys([site.key("root")]))
