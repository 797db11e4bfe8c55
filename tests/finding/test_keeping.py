"""What is kept of remote files: by commands at the same time, of files that change, on a full disk."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from edgemerge.errors import FormatError, OutputError
from edgemerge.finding.finder import Finder
from edgemerge.finding.keeping import keep_file
from edgemerge.remote.address import read_address
from edgemerge.remote.file import RemoteFile
from edgemerge.remote.ranged import Identity, RangedFile
from edgemerge.remote.stand_ins import remove_all
from edgemerge.types import Progress
from tests.support.file_server import serve_folder

RAW = bytes(range(256)) * 8
SHA256 = hashlib.sha256(RAW).hexdigest()
ETAG = Identity(len(RAW), etag='"1"')
NOTHING = Identity(len(RAW))


class Remote:
    """A file that comes when the test lets it."""

    def __init__(self, identity: Identity) -> None:
        self.address = read_address("http://host/a.gguf")
        self.identity = identity
        self.is_asked, self.may_come = threading.Event(), threading.Event()
        self.n_fetches = 0

    def fill(self, buffers: list[memoryview], offset: int, _run: tuple[int, int]) -> None:
        self.n_fetches += 1
        self.is_asked.set()
        assert self.may_come.wait(30)
        for buffer in buffers:
            buffer[:] = RAW[offset : offset + len(buffer)]

    def check_unchanged(self) -> None:
        pass


@contextmanager
def show(_name: str) -> Iterator[Progress]:
    yield lambda _done, _total: None


def keep(remote: Remote, folder: Path, sha256: str | None = None) -> Path:
    return keep_file(cast("RangedFile", remote), folder, sha256, show)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.mark.parametrize(("identity", "sha256"), [(ETAG, None), (NOTHING, None), (NOTHING, SHA256)])
def test_who_waits_for_the_same_file_gets_it(
    identity: Identity,
    sha256: str | None,
    tmp_path: Path,
    pool: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first has the lock; the second waits for it, on a file that then gets another name."""
    import fcntl

    first, second = Remote(identity), Remote(identity)
    is_waiting, lock = threading.Event(), fcntl.flock

    def tell(file: object, what: int) -> None:
        if first.is_asked.is_set():
            is_waiting.set()
        lock(file, what)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", tell)
    one = pool.submit(keep, first, tmp_path, sha256)
    assert first.is_asked.wait(30)
    other = pool.submit(keep, second, tmp_path, sha256)
    assert is_waiting.wait(30)
    first.may_come.set()
    path = one.result(30)
    with path.open("rb") as reader:  # as a merge does meanwhile
        second.may_come.set()
        assert other.result(30) == path == tmp_path / "sha256" / SHA256
        assert reader.read() == RAW
    assert path.read_bytes() == RAW
    assert bool(second.n_fetches) == (identity is NOTHING and sha256 is None)
    assert list((tmp_path / "begun").iterdir()) == []


def test_a_mixture_of_two_versions_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One answer brings the whole file, and the server's file changes meanwhile."""
    served = tmp_path / "served" / "a.gguf"
    served.parent.mkdir()
    served.write_bytes(RAW)
    fill, finder = RemoteFile.fill, Finder(streams=True, keep=tmp_path / "kept")

    def fill_and_change(remote: RemoteFile, *words: Any) -> None:
        fill(remote, *words)
        if served.read_bytes() == RAW:
            served.write_bytes(RAW[::-1])

    monkeypatch.setattr(RemoteFile, "fill", fill_and_change)
    with serve_folder(served.parent) as server:
        address = f"{server.url}/a.gguf"
        with pytest.raises(FormatError, match=r"a\.gguf: was changed on the server while it was"):
            finder.find_model(address)
        assert [path.name for path in (tmp_path / "kept").rglob("*") if path.is_file()] == []
        assert finder.find_model(address).read_bytes() == RAW[::-1]
        remove_all()


def test_what_nobody_goes_on_with_is_removed(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    for name, days in (("old", 40), ("new", 10)):
        (begun / name).write_bytes(RAW)
        os.utime(begun / name, (0, time.time() - days * 86_400))
    remote = Remote(ETAG)
    remote.may_come.set()
    keep(remote, tmp_path)
    assert [path.name for path in begun.iterdir()] == ["new"]


def test_a_full_disk_is_said_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    remote = Remote(ETAG)
    with pytest.raises(OutputError, match=r"it needs 2 KiB, and 1 bytes are free\); free some of"):
        keep(remote, tmp_path)
    assert remote.n_fetches == 0
