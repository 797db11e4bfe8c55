"""Models at addresses stand on another machine as they do on this one."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from edgemerge import open_model
from edgemerge.errors import FormatError
from edgemerge.finding.finder import Finder
from edgemerge.remote import stand_ins
from edgemerge.shown_paths import shown_path
from edgemerge.types import UInt8
from tests.support.file_server import FileServer, serve_folder
from tests.support.fixtures import unpacked
from tests.support.tiny_gguf import write_tiny_gguf

FOLDER = unpacked("models") / "base"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "base").symlink_to(FOLDER)
    with serve_folder(tmp_path) as found:
        yield found
        stand_ins.remove_all()


def first_row(path: Path) -> UInt8:
    with closing(open_model(path)) as model:
        spec = next(iter(model.specs().values()))
        row = np.empty(spec.row_bytes, np.uint8)
        model.read_rows(spec.name, 0, 1, row)
        return row


@pytest.mark.parametrize("name", ["tiny.gguf", "base"])
def test_stand_ins_are_made_again_where_they_are_not(
    tmp_path: Path, server: FileServer, name: str
) -> None:
    address = f"{server.url}/{name}"
    path = Finder(streams=True).find_model(address)
    taken = stand_ins.list_stand_ins()
    stand_ins.remove_all()  # as in another process, on another machine
    assert not path.exists()
    taken.take()
    assert shown_path(path) == address
    assert np.array_equal(first_row(path), first_row(tmp_path / name))
    taken.drop()
    assert stand_ins.find_remote(path) is None


def test_a_worker_removes_what_it_made_and_nothing_of_another(
    tmp_path: Path, server: FileServer
) -> None:
    path = Finder(streams=True).find_model(f"{server.url}/base")
    taken = stand_ins.list_stand_ins()
    (root,) = taken.roots
    stand_ins.remove_all()
    path.mkdir(parents=True)  # by another worker of this machine, which is not done yet
    (path / "config.json").write_bytes(b"{}")
    line = (
        "import pickle, sys; taken = pickle.load(sys.stdin.buffer); taken.take(); "
        "assert all(map(type(list(taken.remote)[0]).exists, [*taken.remote, *taken.small]))"
    )

    def work() -> None:
        command = [sys.executable, "-c", line]
        subprocess.run(command, input=pickle.dumps(taken), check=True, timeout=60)

    work()
    assert [found.name for found in path.iterdir()] == ["config.json"]
    (path / "config.json").unlink()
    work()
    assert not root.exists()


@pytest.mark.parametrize("name", ["tiny.gguf", "base"])
def test_what_is_kept_is_found_where_its_folder_is_seen(
    tmp_path: Path, server: FileServer, name: str
) -> None:
    path = Finder(streams=True, keep=tmp_path / "kept").find_model(f"{server.url}/{name}")
    taken = stand_ins.list_stand_ins()
    stand_ins.remove_all()
    taken.take()
    assert np.array_equal(first_row(path), first_row(tmp_path / name))
    stand_ins.remove_all()
    (tmp_path / "kept").rename(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match="is not there; keep models in a folder that all workers"):
        taken.take()
