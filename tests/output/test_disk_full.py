"""Disks that are full, refuse, or go away: the old output stays, and what is finished can be gone on with."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgemerge import merge
from edgemerge.errors import OutputError
from edgemerge.recipe.recipe import make_recipe
from edgemerge.types import Recipe
from tests.support.crashing import write_models

OLD = b"precious"
N_TENSORS = 11


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "models").mkdir()
    models = write_models(tmp_path / "models")
    return make_recipe("linear", [(models["a"], None), (models["b"], None)], out_type="F16")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB, which is less than the output needs."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
        reason = done.stderr.decode().strip() if done.returncode else ""
    except OSError as error:
        reason = str(error)
    if reason:
        pytest.skip(f"needs to mount a small disk, as root may: {reason}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """An output that is there already."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "out.gguf").write_bytes(OLD)
    return folder / "out.gguf"


def remount(disk: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(disk)], check=True)


# -- real disks ------------------------------------------------------------------------------------


def test_room_that_lacks_is_told_before_the_work(recipe: Recipe, disk: Path) -> None:
    (disk / "out.gguf").write_bytes(OLD)
    message = r"needs 1\d\d KiB and the disk lacks \d\d\.?\d* KiB of it; free some space or choose"
    with pytest.raises(OutputError, match=message):
        merge(recipe, disk / "out.gguf", force=True)
    assert os.listdir(disk) == ["out.gguf"]
    remount(disk, "size=4m")
    assert merge(recipe, disk / "out.gguf", force=True).resumed_tensors == 0


def test_a_disk_that_may_only_be_read_is_told(recipe: Recipe, disk: Path) -> None:
    remount(disk, "ro")
    with pytest.raises(OutputError, match=r"cannot be written \(Read-only file system\)"):
        merge(recipe, disk / "out.gguf")


# -- disks that fail in the middle -----------------------------------------------------------------


def run_until(
    monkeypatch: pytest.MonkeyPatch,
    recipe: Recipe,
    output: Path,
    number: int,
    happen: Callable[[Path], Any],
    suffix: str = ".part",
) -> None:
    """Merge with one worker, and let something happen before a certain write of a file."""
    write, n_writes = os.pwrite, 0

    def pwrite(fd: int, data: Any, offset: int) -> int:
        nonlocal n_writes
        if os.readlink(f"/proc/self/fd/{fd}").endswith(suffix):
            n_writes += 1
            if n_writes == number:
                happen(output)
        return write(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        merge(recipe, output, threads=1, force=True)


def fail_with(number: int) -> Callable[[Path], None]:
    def happen(_path: Path) -> None:
        raise OSError(number, os.strerror(number))

    return happen


def count_finished(error: OutputError, output: Path) -> int:
    """Read off what an error says of how to go on; 0 where nothing is left to go on with."""
    if not output.with_name("out.gguf.part").exists():
        assert not hasattr(error, "__notes__")
        assert os.listdir(output.parent) == ["out.gguf"]
        return 0
    (note,) = error.__notes__
    found = re.fullmatch(
        r"run the same command again to go on after the (\d+) tensors that are finished, or delete (.*)",
        note,
    )
    assert found is not None
    assert found[2] == f"{output}.part"
    return int(found[1])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT], ids=errno.errorcode.get)
@pytest.mark.parametrize("write", [1, 6, N_TENSORS + 1], ids=["first", "middle", "header"])
def test_a_disk_that_refuses_leaves_the_old_output_and_what_is_finished(
    monkeypatch: pytest.MonkeyPatch, recipe: Recipe, output: Path, number: int, write: int
) -> None:
    with pytest.raises(OutputError) as caught:
        run_until(monkeypatch, recipe, output, write, fail_with(number))
    assert str(caught.value) == f"{output}: could not be written ({os.strerror(number)})"
    assert output.read_bytes() == OLD
    n_finished = count_finished(caught.value, output)
    assert n_finished >= write - 1  # a worker may be quicker than the end
    report = merge(recipe, output, force=True)
    assert (report.resumed_tensors, report.damaged_tensors) == (n_finished, 0)
    assert report.sha256 == merge(recipe, output.with_name("whole.gguf")).sha256


def test_a_disk_that_is_full_under_the_journal(
    monkeypatch: pytest.MonkeyPatch, recipe: Recipe, output: Path
) -> None:
    monkeypatch.setattr("edgemerge.output.journal.BATCH_BYTES", 1)
    full = fail_with(errno.ENOSPC)
    with pytest.raises(
        OutputError, match=r"journal: could not be written \(No space left"
    ) as caught:
        run_until(monkeypatch, recipe, output, 2, full, ".journal")
    assert output.read_bytes() == OLD
    assert count_finished(caught.value, output) > 0
    report = merge(recipe, output, force=True)
    assert report.sha256 == merge(recipe, output.with_name("whole.gguf")).sha256
    assert sorted(os.listdir(output.parent)) == ["out.gguf", "whole.gguf"]


@pytest.mark.parametrize("call", ["fsync", "fdatasync"])
def test_a_disk_that_fails_to_sync_is_not_trusted(
    monkeypatch: pytest.MonkeyPatch, recipe: Recipe, output: Path, call: str
) -> None:
    def fail(_fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("edgemerge.output.journal.BATCH_BYTES", 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OutputError, match=r"could not be (written|finished) \(Input/output"):
            merge(recipe, output, force=True)
    assert output.read_bytes() == OLD
    report = merge(recipe, output, force=True)
    assert report.damaged_tensors == 0
    assert os.listdir(output.parent) == ["out.gguf"]


def test_a_folder_that_vanishes_is_told(
    monkeypatch: pytest.MonkeyPatch, recipe: Recipe, output: Path
) -> None:
    with pytest.raises(OutputError, match=r"could not be \w+ \(No such file or directory\)"):
        run_until(monkeypatch, recipe, output, 6, lambda path: shutil.rmtree(path.parent))


def test_a_folder_that_is_moved_keeps_what_was_finished(
    monkeypatch: pytest.MonkeyPatch, recipe: Recipe, output: Path
) -> None:
    moved = output.parent.with_name("moved")
    with pytest.raises(OutputError, match=r"could not be \w+ \(No such file or directory\)"):
        run_until(monkeypatch, recipe, output, 6, lambda path: path.parent.rename(moved))
    assert (moved / "out.gguf").read_bytes() == OLD
    report = merge(recipe, moved / "out.gguf", force=True)
    assert report.resumed_tensors == N_TENSORS
