from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from edgemerge.errors import EdgemergeError, FormatError, MismatchError, OutputError
from edgemerge.output.checksums import TensorResult
from edgemerge.output.journal import Fingerprint, journal_path
from edgemerge.output.parts import OutputParts

FINGERPRINT = Fingerprint("work", "inputs")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def parts_in(folder: Path) -> OutputParts:
    return OutputParts([(folder / f"{i}.gguf", 4) for i in (1, 2, 3)], FINGERPRINT)


def test_all_are_named_at_the_end(tmp_path: Path) -> None:
    with parts_in(tmp_path) as parts:
        for i, file in enumerate(parts.files):
            file.write(bytes([i] * 4), 0)
        journal = "1.gguf.part.journal"
        assert names(tmp_path) == ["1.gguf.part", journal, "2.gguf.part", "3.gguf.part"]
        together, reports = parts.hash()
        parts.publish()
    assert names(tmp_path) == ["1.gguf", "2.gguf", "3.gguf"]
    contents = [(tmp_path / f"{i}.gguf").read_bytes() for i in (1, 2, 3)]
    assert together == hashlib.sha256(b"".join(contents)).hexdigest()
    assert [report.sha256 for report in reports] == [
        hashlib.sha256(content).hexdigest() for content in contents
    ]
    assert [report.n_bytes for report in reports] == [4, 4, 4]


def test_a_failure_leaves_nothing_new(tmp_path: Path) -> None:
    (tmp_path / "1.gguf").write_bytes(b"precious")
    with pytest.raises(KeyboardInterrupt), parts_in(tmp_path):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["1.gguf"]
    assert (tmp_path / "1.gguf").read_bytes() == b"precious"


def test_a_part_that_cannot_be_made_removes_the_others(tmp_path: Path) -> None:
    (tmp_path / "3.gguf.part").mkdir()
    with pytest.raises(OutputError, match=r"3\.gguf: cannot be written"):
        parts_in(tmp_path).__enter__()
    assert names(tmp_path) == ["3.gguf.part"]


@pytest.mark.parametrize("allowed", range(4))
def test_old_and_new_files_never_make_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: int
) -> None:
    """Whatever rename is the last that succeeds, the first file is there only with all."""
    left = allowed
    rename = os.replace

    def replace(source: Path, target: Path) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(5, "Input/output error")
        rename(source, target)

    for i in (1, 2, 3):
        (tmp_path / f"{i}.gguf").write_bytes(b"old")
    monkeypatch.setattr(os, "replace", replace)
    with parts_in(tmp_path) as parts:
        for file in parts.files:
            file.write(b"new!", 0)
        if allowed < 3:
            with pytest.raises(OutputError, match="could not be finished"):
                parts.publish()
        else:
            parts.publish()
    contents = [(tmp_path / f"{i}.gguf").read_bytes() for i in (2, 3)]
    assert (tmp_path / "1.gguf").exists() == (allowed == 3)
    assert contents.count(b"new!") == min(allowed, 2)
    assert not list(tmp_path.glob("*.part"))


# -- what stays for the next run -------------------------------------------------------------------


def interrupt(folder: Path, error: BaseException, *, n_finished: int) -> BaseException:
    try:
        with parts_in(folder) as parts:
            for i in range(n_finished):
                assert parts.journal is not None
                parts.journal.add(i, TensorResult((), 0), 4)
            raise error
    except type(error) as caught:
        return caught
    raise AssertionError


def broken_disk() -> FormatError:
    error = FormatError("could not be read (Input/output error)", path="x.gguf")
    error.__cause__ = OSError(5, "Input/output error")
    return error


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        OutputError("could not be written", path="x"),
        OSError(5, "x"),
        MemoryError(),
        broken_disk(),
    ],
    ids=repr,
)
def test_what_another_run_may_cure_leaves_it_something(
    tmp_path: Path, error: BaseException
) -> None:
    caught = interrupt(tmp_path, error, n_finished=2)
    assert caught.__notes__ == [
        "run the same command again to go on after the 2 tensors that are finished, "
        f"or delete {tmp_path / '1.gguf.part'}"
    ]
    expected = ["1.gguf.part", "1.gguf.part.journal", "2.gguf.part", "3.gguf.part"]
    assert names(tmp_path) == expected
    with parts_in(tmp_path) as parts:
        assert parts.earlier is not None
        assert parts.earlier.results == {0: TensorResult((), 0), 1: TensorResult((), 0)}


@pytest.mark.parametrize(
    "error",
    [MismatchError("no"), FormatError("no", path="x"), EdgemergeError("no")],
    ids=repr,
)
def test_what_no_run_can_cure_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    caught = interrupt(tmp_path, error, n_finished=2)
    assert not hasattr(caught, "__notes__")
    assert names(tmp_path) == []


def test_where_nothing_is_finished_nothing_stays(tmp_path: Path) -> None:
    interrupt(tmp_path, KeyboardInterrupt(), n_finished=0)
    assert names(tmp_path) == []


def test_a_run_that_goes_on_is_alone(tmp_path: Path) -> None:
    interrupt(tmp_path, KeyboardInterrupt(), n_finished=1)
    journal = journal_path(tmp_path / "1.gguf")
    with parts_in(tmp_path):
        before = journal.read_bytes()
        with pytest.raises(OutputError, match="another merge is writing it; wait for that one"):
            parts_in(tmp_path).__enter__()
        assert journal.read_bytes() == before


def test_hashing_tells_how_many_bytes_are_done(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    sizes = [(tmp_path / "a", 3 << 20), (tmp_path / "b", 5)]
    with OutputParts(sizes, FINGERPRINT) as parts:
        parts.hash(lambda *counts: told.append(counts))
    assert told[-1] == ((3 << 20) + 5,) * 2
    assert told == sorted(set(told))
