"""A fetch over a network goes on where it stopped, whatever the server can do, and loses nothing."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgemerge.errors import (
    FormatError,
    OutputError,
    RecipeError,
    RuntimeFailure,
    VerificationError,
)
from edgemerge.fleet.registry import client
from edgemerge.fleet.registry.client import state_folder
from edgemerge.remote import failures
from edgemerge.types import Progress
from tests.support.file_server import FileServer, serve_folder
from tests.support.registries import NOW, Site, ignore


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    site = Site(tmp_path_factory.mktemp("made"))
    site.publish()
    return site


@pytest.fixture
def server(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(failures, "DELAYS", (0.0, 0.01, 0.01))
    monkeypatch.setattr(failures, "FIRST_DELAYS", (0.0, 0.01))
    with serve_folder(site.path) as server:
        yield server


class Interrupt(Exception):
    """Somebody stops the fetch."""


def stop_after(n_bytes: int) -> Progress:
    def progress(done: int, _total: int) -> None:
        if done >= n_bytes:
            raise Interrupt

    return progress


def content(site: Site) -> bytes:
    return (site.folder / "file.gguf").read_bytes()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_registry_on_a_web_server_is_read(
    ranges: bool, site: Site, server: FileServer, tmp_path: Path
) -> None:
    server.ranges = ranges
    there = site.reader(server.url, state=f"state-{ranges}")
    got = there.fetch(there.find("ward"), tmp_path, ignore)
    assert got.read_bytes() == content(site)
    assert list(tmp_path.iterdir()) == [got]


def test_what_the_disk_has_no_room_for_is_not_fetched(
    site: Site, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = site.reader(server.url, state="state-room")
    entry = there.find("ward")
    disk = os.statvfs(tmp_path)
    full = os.statvfs_result([512, 512, *disk[2:4], 1, *disk[5:]])
    monkeypatch.setattr(os, "fstatvfs", lambda _fd: full)
    n_asked = len(server.requests)
    with pytest.raises(OutputError, match=r"and the disk lacks .* of it; free some"):
        there.fetch(entry, tmp_path, ignore)
    assert len(server.requests) == n_asked


def test_python_tufs_own_client_reads_it(site: Site, server: FileServer, tmp_path: Path) -> None:
    from tuf.ngclient import Updater

    (tmp_path / "metadata").mkdir()
    updater = Updater(
        str(tmp_path / "metadata"),
        f"{server.url}/metadata",
        str(tmp_path),
        f"{server.url}/targets",
        bootstrap=site.root.read_bytes(),
    )
    updater._trusted_set.reference_time = NOW
    found = updater.get_targetinfo("ward/1/ward-1.delta.gguf")
    assert found is not None
    assert Path(updater.download_target(found)).read_bytes() == content(site)


def test_a_connection_that_breaks_goes_on(site: Site, server: FileServer, tmp_path: Path) -> None:
    there = site.reader(server.url)
    entry = there.find("ward")
    server.drop_each = 2
    assert there.fetch(entry, tmp_path, ignore).read_bytes() == content(site)
    assert server.sent < entry.n_bytes + 20_000  # with the index


@pytest.mark.parametrize("where", ["server", "folder"])
def test_an_interrupted_fetch_goes_on(
    where: str, site: Site, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgemerge.fleet.registry import carrier
    from edgemerge.remote import file

    monkeypatch.setattr(file, "PIECE", 1 << 14)
    monkeypatch.setattr(carrier, "PIECE", 1 << 14)
    there = site.reader(server.url if where == "server" else None)
    entry = there.find("ward")
    with pytest.raises(Interrupt):
        there.fetch(entry, tmp_path, stop_after(100_000))
    (part,) = tmp_path.iterdir()
    begun = part.stat().st_size
    assert 100_000 <= begun < entry.n_bytes
    done: list[int] = []
    got = there.fetch(entry, tmp_path, lambda at, _total: done.append(at))
    assert got.read_bytes() == content(site)
    assert done[0] == begun + (1 << 14)
    assert list(tmp_path.iterdir()) == [got]
    if where == "server":
        assert server.requests[-1][1] == f"bytes={begun}-{entry.n_bytes - 1}"


def test_without_ranges_it_begins_anew(
    site: Site, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgemerge.remote import file

    monkeypatch.setattr(file, "PIECE", 1 << 14)
    server.ranges = False
    there = site.reader(server.url)
    entry = there.find("ward")
    with pytest.raises(Interrupt):
        there.fetch(entry, tmp_path, stop_after(100_000))
    assert there.fetch(entry, tmp_path, ignore).read_bytes() == content(site)


@pytest.mark.parametrize("damaged", [b"\xff" * 5000, b"\xff" * 500_000])
def test_what_was_begun_and_is_damaged_is_fetched_again(
    damaged: bytes, site: Site, server: FileServer, tmp_path: Path
) -> None:
    there = site.reader(server.url)
    entry = there.find("ward")
    client._part_of(tmp_path / entry.file_name, entry).write_bytes(damaged)
    assert there.fetch(entry, tmp_path, ignore).read_bytes() == content(site)


def test_another_file_of_that_name_is_left(site: Site, tmp_path: Path) -> None:
    there = site.reader()
    entry = there.find("ward")
    mine = tmp_path / entry.file_name
    mine.write_text("mine")
    with pytest.raises(OutputError, match="is another file than the registry's; move it away"):
        there.fetch(entry, tmp_path, ignore)
    assert mine.read_text() == "mine"
    mine.unlink()
    mine.mkdir()
    with pytest.raises(OutputError, match="is another file"):
        there.fetch(entry, tmp_path, ignore)


def test_two_fetches_do_not_write_one_file(site: Site, tmp_path: Path) -> None:
    there = site.reader()
    entry = there.find("ward")
    with client._part_of(tmp_path / entry.file_name, entry).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another fetch is at work"):
            there.fetch(entry, tmp_path, ignore)
    there.fetch(entry, tmp_path, ignore)


def test_a_link_in_the_place_of_what_was_begun_is_not_followed(site: Site, tmp_path: Path) -> None:
    there = site.reader()
    entry = there.find("ward")
    mine = tmp_path / "mine"
    mine.write_text("mine")
    client._part_of(tmp_path / entry.file_name, entry).symlink_to(mine)
    with pytest.raises(OutputError, match="cannot be written"):
        there.fetch(entry, tmp_path, ignore)
    assert mine.read_text() == "mine"


def test_a_server_that_cuts_a_file_is_refused(
    server: FileServer, site: Site, tmp_path: Path
) -> None:
    mirror = site.mirror(f"cut-{tmp_path.name}")
    path = next(mirror.rglob("*.gguf"))
    path.write_bytes(path.read_bytes()[:-1000])
    server.folder = mirror
    for ranges in (True, False):
        server.ranges = ranges
        there = site.reader(server.url)
        n_bytes = there.find("ward").n_bytes
        with pytest.raises(
            FormatError, match=f"has {n_bytes - 1000} bytes and should have {n_bytes}"
        ):
            there.fetch(there.find("ward"), tmp_path, ignore)
    client._part_of(tmp_path / there.find("ward").file_name, there.find("ward")).write_bytes(
        path.read_bytes()
    )
    server.ranges = True
    with pytest.raises(FormatError, match="is shorter than the"):
        there.fetch(there.find("ward"), tmp_path, ignore)


def test_a_server_that_is_away_is_named(server: FileServer, site: Site, tmp_path: Path) -> None:
    there = site.reader(server.url)
    entry = there.find("ward")
    server.refuse = lambda path, number: 503
    with pytest.raises(
        FormatError, match=r"could not be read in 3 tries \(the server answers 503\)"
    ):
        there.fetch(entry, tmp_path, ignore)
    with pytest.raises(FormatError, match=r"timestamp\.json|root\.json"):
        site.reader(server.url, state="away").refresh()
    server.refuse = lambda path, number: 404
    with pytest.raises(FormatError, match=r"is not there \(404\)"):
        there.fetch(entry, tmp_path, ignore)
    with pytest.raises(VerificationError, match="is not there; check the registry's address"):
        site.reader(server.url, state="away").refresh()


def test_a_server_that_is_busy_now_and_then_is_asked_again(
    server: FileServer, site: Site, tmp_path: Path
) -> None:
    there = site.reader(server.url)
    entry = there.find("ward")
    server.refuse = lambda path, number: 429 if number % 2 else None
    assert there.fetch(entry, tmp_path, ignore).read_bytes() == content(site)


def test_a_server_that_always_breaks_at_the_same_byte_is_given_up(
    server: FileServer, site: Site, tmp_path: Path
) -> None:
    there = site.reader(server.url)
    entry = there.find("ward")
    server.ranges, server.drop_each = False, 1
    with pytest.raises(FormatError, match="could not be read in"):
        there.fetch(entry, tmp_path, ignore)


def test_a_stranger_address_is_refused(site: Site) -> None:
    with pytest.raises(RecipeError, match="a registry is read from a folder"):
        site.reader("hf://org/name").refresh()


def test_what_is_known_of_two_registries_is_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folders = {
        state_folder(a) for a in ("https://host/a", "https://host/b", "https://other/a", "/a")
    }
    assert len(folders) == 4
    assert {folder.parent for folder in folders} == {tmp_path / "edgemerge" / "registries"}
    assert state_folder("https://user:secret@host/a?token=x") == state_folder("https://host/a/")


def test_without_python_tuf_it_is_said(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "find_spec", lambda name: None)
    with pytest.raises(RuntimeFailure, match=r"pip install 'edgemerge\[fleet\]'"):
        site.reader()


def test_a_bucket_and_an_sftp_server_are_read(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("s3fs", "moto", "flask_cors", "paramiko"):
        pytest.importorskip(package)
    from tests.support.s3_server import BUCKET, serve_s3
    from tests.support.sftp_server import serve_sftp

    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    with serve_s3(site.path, monkeypatch), serve_sftp(home) as server:
        for number, address in enumerate((f"s3://{BUCKET}", server.at(site.path))):
            there = site.reader(address, state=f"state-{number}-of-stores")
            entry = there.find("ward")
            part = client._part_of(tmp_path / str(number) / entry.file_name, entry)
            part.parent.mkdir()
            part.write_bytes(content(site)[:70_000])
            got = there.fetch(entry, part.parent, ignore)
            assert got.read_bytes() == content(site)
