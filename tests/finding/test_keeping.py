"""Commands that keep the same remote file in one folder at the same time."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest

from edgemerge.finding.keeping import keep_file
from edgemerge.remote.address import read_address
from edgemerge.remote.ranged import Identity, RangedFile
from edgemerge.types import Progress

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
    assert second.n_fetches == (identity is NOTHING and sha256 is None)
    assert list((tmp_path / "begun").iterdir()) == []
