from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgemerge.runtime.bench.load_time import drop_cache, load_timed
from tests.support.page_cache import share_of


def test_the_cache_is_dropped_or_it_is_said_why_not(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(1 << 20))
    assert share_of(path) == 1.0
    note = drop_cache([path])
    assert (note == "") == (share_of(path) <= 0.01)
    path.read_bytes()
    assert share_of(path) == 1.0


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no disk in memory here")
def test_a_disk_in_memory_cannot_be_cold() -> None:
    path = Path(f"/dev/shm/edgemerge-test-{os.getpid()}")
    path.write_bytes(bytes(1 << 16))
    try:
        assert drop_cache([path]).startswith("the kernel keeps 100 % of the file in memory: ")
    finally:
        path.unlink()


def test_an_empty_file_is_cold(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    assert drop_cache([tmp_path / "x"]) == ""


@pytest.mark.llama
def test_loading_is_timed_up_to_the_first_token(tiny_gguf: Path) -> None:
    model, seconds = load_timed(tiny_gguf, n_threads=1)
    with model:
        assert 0.0 < seconds < 60.0
        assert model.n_threads == 1
