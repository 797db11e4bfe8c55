"""Files are read by few descriptors: those that were not read for long are closed, and opened again."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from edgemerge.errors import FormatError
from edgemerge.formats.descriptors import OpenFiles


def write(folder: Path, n: int) -> list[Path]:
    paths = [folder / f"{i}.bin" for i in range(n)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 8)
    return paths


def n_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_many_files_have_few_descriptors(tmp_path: Path) -> None:
    files, before = OpenFiles(3), n_descriptors()
    opened = [files.open(path) for path in write(tmp_path, 20)]
    for _ in range(2):
        for i, file in enumerate(opened):
            with files.reading(file) as fd:
                assert os.pread(fd, 8, 0) == bytes([i]) * 8
            assert n_descriptors() <= before + 3
    for file in opened:
        files.close(file)
    assert n_descriptors() == before


def test_what_is_read_is_not_closed(tmp_path: Path) -> None:
    files = OpenFiles(1)
    first, second = (files.open(path) for path in write(tmp_path, 2))
    with files.reading(first) as one, files.reading(second) as two:
        assert (os.pread(one, 1, 0), os.pread(two, 1, 0)) == (b"\0", b"\1")
    files.close(first)
    files.close(second)


def test_another_file_in_its_place_is_refused(tmp_path: Path) -> None:
    files, (path, other) = OpenFiles(1), write(tmp_path, 2)
    first, second = files.open(path), files.open(other)
    path.unlink()
    with pytest.raises(FileNotFoundError), files.reading(first):
        pass
    path.write_bytes(b"something else")
    with pytest.raises(FormatError, match="was changed while it was read"), files.reading(first):
        pass
    with files.reading(second) as fd:  # and the others go on
        assert os.pread(fd, 1, 0) == b"\1"
    files.close(first)
    files.close(second)


def test_a_relative_path_is_found_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    files = OpenFiles(1)
    first, second = files.open(Path("0.bin")), files.open(Path("1.bin"))
    monkeypatch.chdir("/")
    with files.reading(first) as fd:
        assert os.pread(fd, 1, 0) == b"\0"
    files.close(first)
    files.close(second)


def test_a_pipe_stays_open(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    files = OpenFiles(1)
    pipe = files.open(tmp_path / "pipe")
    others = [files.open(path) for path in write(tmp_path, 3)]
    assert not pipe.is_regular
    with files.reading(pipe) as fd:
        os.fstat(fd)
    for file in (pipe, *others):
        files.close(file)


def test_threads_read_what_they_asked_for(tmp_path: Path) -> None:
    files = OpenFiles(2)
    opened = [files.open(path) for path in write(tmp_path, 12)]
    wrong: list[int] = []

    def read(seed: int) -> None:
        for step in range(400):
            i = (seed * 7 + step * 5) % 12
            with files.reading(opened[i]) as fd:
                if os.pread(fd, 8, 0) != bytes([i]) * 8:
                    wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    for file in opened:
        files.close(file)
