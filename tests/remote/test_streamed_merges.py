"""Merges of models on another machine: the bytes of the same merge from this one's disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgemerge import merge, open_model
from edgemerge.errors import EdgemergeError, FormatError
from edgemerge.finding.finder import Finder
from edgemerge.recipe.recipe import load_recipe, make_recipe
from edgemerge.remote import file as remote_file
from edgemerge.remote import stand_ins
from tests.support.crashing import write_models
from tests.support.file_server import FileServer, serve_folder

STREAMS = Finder(streams=True)


@pytest.fixture(name="models")
def _models(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "models"
    folder.mkdir()
    return write_models(folder)


@pytest.fixture(name="server")
def _server(
    tmp_path: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[FileServer]:
    """A server of the models, whose clients do not wait long; nothing of them is left."""
    monkeypatch.setattr(remote_file, "DELAYS", (0.0, 0.01, 0.01))
    monkeypatch.setattr(remote_file, "FIRST_DELAYS", (0.0, 0.01))
    with serve_folder(tmp_path / "models") as server:
        yield server
        stand_ins.remove_all()


def merged(models: list[str], output: Path, method: str = "linear", **settings: object) -> str:
    base = settings.pop("base", None)
    recipe = make_recipe(
        method,
        [(model, None) for model in models],
        base=None if base is None else str(base),
        out_type="Q8_0",
        finder=STREAMS,
        parameters=settings,
    )
    return merge(recipe, output, threads=2).sha256


def at(server: FileServer, path: str) -> str:
    return f"{server.url}/{Path(path).name}"


def test_a_merge_of_files_on_a_server_has_the_bytes_of_one_from_disk(
    server: FileServer, models: dict[str, str], tmp_path: Path
) -> None:
    here = [models["a"], models["b"]]
    wanted = merged(here, tmp_path / "here.gguf")
    assert merged([at(server, one) for one in here], tmp_path / "there.gguf") == wanted
