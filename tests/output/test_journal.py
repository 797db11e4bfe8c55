"""The journal as a file: what is read is what was written, whatever became of its bytes."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemerge.errors import FormatError, OutputError
from edgemerge.output.checksums import TensorResult
from edgemerge.output.journal import Entries, Fingerprint, Journal, journal_path, read_journal

FINGERPRINT = Fingerprint("work", "inputs")
CRC = st.integers(0, 2**32 - 1)
RESULTS = st.dictionaries(
    st.integers(0, 10**6),
    st.builds(TensorResult, st.lists(CRC, max_size=4).map(tuple), CRC),
    max_size=8,
)
MARKS = st.lists(st.tuples(CRC, CRC, st.integers(-(2**62), 2**62)), max_size=3)


def sync_nothing() -> None:
    """There is no output."""


def write(
    path: Path,
    results: dict[int, TensorResult],
    files: list[tuple[int, int, int]] | None = None,
    earlier: Entries | None = None,
) -> bytes:
    journal = Journal(path, FINGERPRINT, earlier, sync_nothing)
    for number, result in results.items():
        journal.add(number, result, 1)
    if files is not None:
        journal.complete(files)
    journal.close()
    return path.read_bytes()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return journal_path(tmp_path_factory.mktemp("journal") / "out.gguf")


def test_it_lies_beside_the_part(path: Path) -> None:
    assert path.name == "out.gguf.part.journal"


@given(results=RESULTS, marks=MARKS, finishes=st.booleans())
def test_what_was_written_is_read(
    path: Path, results: dict[int, TensorResult], marks: list[tuple[int, int, int]], finishes: bool
) -> None:
    raw = write(path, results, marks if finishes else None)
    files = tuple(marks) if finishes else ()
    assert read_journal(path) == Entries(FINGERPRINT, results, files, len(raw))


@given(first=RESULTS, second=RESULTS)
def test_another_run_adds_to_it(
    path: Path, first: dict[int, TensorResult], second: dict[int, TensorResult]
) -> None:
    torn = write(path, first)[:-1]
    path.write_bytes(torn)
    earlier = read_journal(path)
    if not first:
        assert earlier is None
        return
    assert earlier is not None
    assert earlier.results == dict(list(first.items())[:-1])
    write(path, second, earlier=earlier)
    found = read_journal(path)
    assert found is not None
    assert found.results == earlier.results | second


@given(results=RESULTS, data=st.data())
def test_a_journal_that_is_cut_says_what_is_whole(
    path: Path, results: dict[int, TensorResult], data: st.DataObject
) -> None:
    raw = write(path, results)
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    found = read_journal(path)
    if found is not None:
        assert list(found.results.items()) == list(results.items())[: len(found.results)]
        assert raw.startswith(path.read_bytes()[: found.n_bytes])


@given(results=RESULTS, junk=st.binary(min_size=1, max_size=40), data=st.data())
def test_a_damaged_journal_tells_no_lies(
    path: Path, results: dict[int, TensorResult], junk: bytes, data: st.DataObject
) -> None:
    raw = bytearray(write(path, results))
    at = data.draw(st.integers(0, len(raw)))
    raw[at : at + data.draw(st.integers(0, 40))] = junk
    path.write_bytes(raw)
    try:
        found = read_journal(path)
    except FormatError:
        return
    if found is not None:
        assert found.fingerprint == FINGERPRINT
        assert found.results.items() <= results.items()


@pytest.mark.parametrize("text", [b"another 1 a b", b"edgemerge-journal 2 a b", b"tensor 1 2"])
def test_a_journal_of_another_version_is_refused(path: Path, text: bytes) -> None:
    import zlib

    path.write_bytes(b"%08x %s\n" % (zlib.crc32(text), text))
    with pytest.raises(FormatError, match="is no journal of this version"):
        read_journal(path)


# -- the order of things ---------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], bool]], None]:
    """Let every tensor be a batch; return how to wait."""
    monkeypatch.setattr("edgemerge.output.journal.BATCH_BYTES", 1)

    def wait_for(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.001)

    return wait_for


def test_a_line_comes_after_the_bytes_that_it_speaks_of(
    tmp_path: Path, quick: Callable[[Callable[[], bool]], None]
) -> None:
    path = tmp_path / "x"
    seen: list[int] = []
    journal = Journal(
        path, FINGERPRINT, None, lambda: seen.append(path.read_bytes().count(b"tensor"))
    )
    for number in range(3):
        journal.add(number, TensorResult((), 0), 1)
        quick(lambda number=number: path.read_bytes().count(b"tensor") == number + 1)  # type: ignore[misc]
    journal.close()
    assert seen == [0, 1, 2]


def test_small_tensors_wait_for_a_batch(tmp_path: Path) -> None:
    syncs: list[None] = []
    journal = Journal(tmp_path / "x", FINGERPRINT, None, lambda: syncs.append(None))
    for number in range(100):
        journal.add(number, TensorResult((), 0), 1000)
    assert syncs == []
    journal.complete([])
    assert syncs == [None]
    journal.remove()
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fails_ends_the_work_and_nothing_is_noted(
    tmp_path: Path, quick: Callable[[Callable[[], bool]], None]
) -> None:
    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = tmp_path / "x"
    journal = Journal(path, FINGERPRINT, None, fail)
    journal.add(0, TensorResult((), 0), 1)
    quick(lambda: not journal._thread.is_alive())
    with pytest.raises(OutputError, match=r"x: could not be written \(Input/output error\)"):
        journal.add(1, TensorResult((), 0), 1)
    with pytest.raises(OutputError, match=r"x: could not be written \(Input/output error\)"):
        journal.complete([])
    journal.close()
    entries = read_journal(path)
    assert entries is not None
    assert entries.results == {}


def test_what_is_no_file_is_left_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x")
    with pytest.raises(OutputError, match="x: is no regular file; remove it"):
        Journal(tmp_path / "x", FINGERPRINT, None, sync_nothing)
    assert os.listdir(tmp_path) == ["x"]
