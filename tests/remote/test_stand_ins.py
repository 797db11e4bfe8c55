"""Models at addresses stand on another machine as they do on this one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from edgemerge import open_model
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
