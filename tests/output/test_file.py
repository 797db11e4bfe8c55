from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edgemerge.errors import OutputError
from edgemerge.output.file import OutputFile, check_output, write_all, write_file


def refusal(path: Path, *inputs: Path, force: bool = False) -> str:
    with pytest.raises(OutputError) as caught:
        check_output(path, inputs, force=force)
    assert caught.value.path == path
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out.gguf"


# -- may it be written? ----------------------------------------------------------------------------


def test_a_new_name_is_fine(target: Path) -> None:
    check_output(target, (), force=False)


def test_an_existing_file_needs_force(target: Path) -> None:
    target.write_bytes(b"precious")
    assert refusal(target) == "exists already; choose another name or give --force"
    check_output(target, (), force=True)


def test_a_link_that_leads_nowhere_exists_too(target: Path) -> None:
    target.symlink_to("gone")
    assert refusal(target) == "exists already; choose another name or give --force"


def test_an_input_is_never_an_output(target: Path, tmp_path: Path) -> None:
    target.write_bytes(b"precious")
    assert refusal(target, target, force=True) == "is one of the inputs; choose another name"
    link = tmp_path / "link.gguf"
    link.symlink_to(target)
    assert refusal(link, target, force=True) == "is one of the inputs; choose another name"


def test_a_hard_link_to_an_input_is_no_output(target: Path, tmp_path: Path) -> None:
    target.write_bytes(b"precious")
    link = tmp_path / "link.gguf"
    link.hardlink_to(target)
    assert refusal(link, target, force=True) == "is one of the inputs; choose another name"


def test_an_input_is_not_the_part_of_an_output(target: Path, tmp_path: Path) -> None:
    """The part would be cut to nothing before it is read."""
    given = tmp_path / "out.gguf.part"
    given.write_bytes(b"precious")
    assert refusal(target, given) == "is one of the inputs; choose another name"


def test_a_private_file_is_its_owners(target: Path) -> None:
    (target.parent / "out.gguf.part").write_bytes(b"left by a run that was killed")
    write_file(target, b"secret", is_private=True)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert target.read_bytes() == b"secret"


def test_the_files_of_an_input_folder_are_never_replaced(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"precious")
    message = "belongs to one of the inputs; choose another name"
    assert refusal(weights, tmp_path, force=True) == message
    old = tmp_path / "merged.gguf"  # a merge kept beside its input is not part of it
    old.write_bytes(b"old")
    check_output(old, (tmp_path,), force=True)


def test_folders_and_devices_are_no_outputs(tmp_path: Path) -> None:
    assert refusal(tmp_path, force=True) == "is a folder; give the name of a file"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    message = "is no regular file; choose another name"
    assert refusal(pipe, force=True) == message
    assert refusal(Path("/dev/null"), force=True) == message


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "no"
    assert refusal(folder / "x.gguf") == f"the folder {folder} does not exist; make it first"


# -- writing ---------------------------------------------------------------------------------------


def test_published_file_has_the_bytes_in_their_places(target: Path) -> None:
    with OutputFile(target, 10) as file:
        assert file.part.stat().st_size == 10
        file.write(np.frombuffer(b"world", np.uint8), 5)
        file.write(b"hello", 0)
        assert b"".join(map(bytes, file.chunks())) == b"helloworld"
        assert not target.exists()
        file.publish()
    assert target.read_bytes() == b"helloworld"
    assert os.listdir(target.parent) == ["out.gguf"]


def test_a_write_that_takes_only_some_is_gone_on_with(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: write(fd, data[:3], offset))
    with target.open("wb") as file:
        write_all(file.fileno(), np.arange(10, dtype=np.uint8), 2)
    assert target.read_bytes() == bytes([0, 0, *range(10)])


def test_an_unpublished_file_leaves_nothing_and_keeps_what_was_there(target: Path) -> None:
    target.write_bytes(b"old")
    with contextlib.suppress(KeyboardInterrupt), OutputFile(target, 10) as file:
        file.write(b"new", 0)
        raise KeyboardInterrupt
    assert target.read_bytes() == b"old"
    assert os.listdir(target.parent) == ["out.gguf"]


def test_a_part_of_a_killed_merge_is_taken_over(target: Path) -> None:
    part = target.with_name("out.gguf.part")
    part.write_bytes(b"x" * 100)
    with OutputFile(target, 4) as file:
        file.write(b"full", 0)
        file.publish()
    assert target.read_bytes() == b"full"


def test_a_second_merge_to_the_same_file_is_refused_and_harms_nothing(target: Path) -> None:
    with OutputFile(target, 4) as first:
        with pytest.raises(OutputError, match="another merge is writing it; wait for that one"):
            OutputFile(target, 8).__enter__()
        first.write(b"full", 0)
        first.publish()
    assert target.read_bytes() == b"full"


def test_a_lock_on_a_file_that_was_just_published_is_not_taken(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between open and lock the other merge finishes: its result must not be cut to nothing."""
    lock = fcntl.flock
    others = [b"theirs"]

    def flock_late(fd: int, operation: int) -> None:
        if others:
            target.with_name("out.gguf.part").write_bytes(others.pop())
            os.replace(target.with_name("out.gguf.part"), target)
        lock(fd, operation)

    monkeypatch.setattr("edgemerge.output.file.fcntl.flock", flock_late)
    with OutputFile(target, 8):
        assert target.read_bytes() == b"theirs"
    assert target.read_bytes() == b"theirs"
    assert os.listdir(target.parent) == ["out.gguf"]


def test_a_part_that_is_no_file_is_left_alone(target: Path) -> None:
    part = target.with_name("out.gguf.part")
    os.mkfifo(part)
    with pytest.raises(OutputError, match=r"out\.gguf\.part beside it is no regular file"):
        OutputFile(target, 8).__enter__()
    part.unlink()
    part.symlink_to("elsewhere")
    with pytest.raises(OutputError, match=r"cannot be written \(Too many levels of symbolic"):
        OutputFile(target, 8).__enter__()
    assert part.is_symlink()


# -- a disk that refuses ---------------------------------------------------------------------------


@contextmanager
def refused(target: Path, message: str) -> Iterator[None]:
    with pytest.raises(OutputError) as caught:
        yield
    assert str(caught.value) == f"{target}: {message}"
    assert os.listdir(target.parent) == []


def test_too_small_a_disk_is_known_before_the_work(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = SimpleNamespace(f_bavail=1, f_frsize=4096)
    monkeypatch.setattr(os, "fstatvfs", lambda _fd: small)
    message = "needs 12 KiB and the disk lacks 8 KiB of it; free some space or choose another"
    with refused(target, message):
        OutputFile(target, 12 << 10).__enter__()


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "needs 12 KiB and the disk is full; free some space or choose another"),
        (errno.EDQUOT, "needs 12 KiB, which cannot be had there (Disk quota exceeded)"),
        (errno.EFBIG, "needs 12 KiB, which cannot be had there (File too large)"),
    ],
)
def test_a_disk_that_cannot_reserve(
    target: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    def refuse(*_args: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with refused(target, message):
        OutputFile(target, 12 << 10).__enter__()


def test_an_interrupt_while_reserving_leaves_nothing(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_args: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "posix_fallocate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        OutputFile(target, 8).__enter__()
    assert os.listdir(target.parent) == []


def test_a_disk_that_fails_while_writing(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with (
        refused(target, "could not be written (Input/output error)"),
        OutputFile(target, 8) as file,
    ):
        monkeypatch.setattr(os, "pwrite", fail)
        file.write(b"x", 0)


def test_a_disk_that_fails_at_the_end(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with (
        refused(target, "could not be finished (Input/output error)"),
        OutputFile(target, 8) as file,
    ):
        monkeypatch.setattr(os, "fsync", fail)
        file.publish()


def test_a_lock_that_the_file_system_does_not_know(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("edgemerge.output.file.fcntl.flock", fail)
    with pytest.raises(OutputError, match=r"cannot be locked \(No locks available\); choose a fo"):
        OutputFile(target, 8).__enter__()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(target: Path) -> None:
    target.parent.chmod(0o555)
    try:
        with refused(target, "cannot be written (Permission denied)"):
            OutputFile(target, 8).__enter__()
    finally:
        target.parent.chmod(0o755)


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 252)
    check_output(long, (), force=False)
    with pytest.raises(OutputError, match=r"cannot be written \(File name too long\)"):
        OutputFile(long, 8).__enter__()
