"""Inputs and the page cache: a merge leaves it as it found it."""

from __future__ import annotations

import mmap
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgemerge import open_model
from edgemerge.formats import files
from edgemerge.runtime.bench.load_time import drop_cache
from edgemerge.types import Source
from tests.support.page_cache import share_of
from tests.support.small_models import wide_tensors, write_gguf


def read_and_forget(model: Source) -> None:
    for name, spec in model.specs().items():
        model.read_rows(name, 0, spec.n_rows, np.empty(spec.nbytes, np.uint8))
        model.forget(name)


@pytest.fixture(params=["GGUF", "Hugging Face"])
def weights(request: pytest.FixtureRequest, tmp_path: Path, models_dir: Path) -> Path:
    """The file with the tensors of a model, this test's own."""
    if request.param == "GGUF":
        return write_gguf(tmp_path / "base.gguf", wide_tensors(0))
    shutil.copytree(models_dir / "base", tmp_path / "base")
    return tmp_path / "base" / "model.safetensors"


def open_weights(weights: Path) -> Source:
    return open_model(weights if weights.suffix == ".gguf" else weights.parent)


def test_a_file_that_was_in_the_page_cache_stays_there(weights: Path) -> None:
    weights.read_bytes()
    model = open_weights(weights)
    read_and_forget(model)
    assert share_of(weights) == 1.0
    model.close()


def test_pages_that_reading_brought_are_given_back(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if drop_cache([weights]):
        pytest.skip("this disk keeps its files in memory")
    # The header of so small a file brings all of it; of a real one it is a small part.
    monkeypatch.setattr(files, "cached_share", lambda fd: 0.5)
    model = open_weights(weights)
    read_and_forget(model)
    assert share_of(weights) < 0.9
    model.close()


def test_share_of_a_file_by_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(3_300_000))
    monkeypatch.setattr(files, "SAMPLE", 1 << 16)
    monkeypatch.setattr(files, "N_SAMPLES", 10)
    assert share_of(path) == 1.0
    if drop_cache([path]):
        pytest.skip("this disk keeps its files in memory")
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # reads nothing ahead
    os.pread(fd, path.stat().st_size // 2, 0)
    assert files.cached_share(fd) == pytest.approx(0.5, abs=0.1)
    os.close(fd)
    path.write_bytes(b"")
    assert share_of(path) == 0.0


def test_a_file_of_which_linux_does_not_tell_is_not_taken_for_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(5000))
    with path.open("rb") as file:
        assert files.was_cached(file.fileno())
        monkeypatch.setattr(os, "access", lambda *_: False)
        monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
        assert not files.was_cached(file.fileno())


def test_a_file_that_cannot_be_mapped_is_not_taken_for_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("mmap length is greater than file size")

    path = tmp_path / "data"
    path.write_bytes(bytes(5000))
    monkeypatch.setattr(mmap, "mmap", refuse)
    with path.open("rb") as file:
        assert not files.was_cached(file.fileno())
