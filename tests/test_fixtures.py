"""Packed fixtures unpack to the files that they stand for, and are few bytes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import fixtures
from tests.support.places import ROOT, TESTS
from tools.pack_fixtures import pack

MAX_BYTES = 20_000_000  # of all tracked files below tests but Python's


def script(name: str) -> Path:
    command = [sys.executable, str(TESTS / "support" / "fixtures.py"), name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Path(done.stdout.strip())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "edgemerge" / "fixtures"


@pytest.mark.parametrize("name", fixtures.FOLDERS)
def test_they_unpack_to_what_their_sums_say(cache: Path, name: str) -> None:
    folder = script(name)
    assert fixtures.is_whole(folder, fixtures.read_sums(fixtures.FOLDERS[name]))
    assert list(cache.iterdir()) == [folder]


def test_a_damaged_cache_is_made_anew(cache: Path) -> None:
    folder = script("golden")
    file = folder / "inputs_f32" / "a" / "config.json"
    stored = file.read_bytes()
    file.write_bytes(b"{}")
    assert script("golden") == folder
    assert file.read_bytes() == stored
    assert list(cache.iterdir()) == [folder]


def test_two_may_unpack_at_once(cache: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(script, ["golden"] * 4))
    assert list(cache.iterdir()) == list(found)


def test_a_changed_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    stored = shutil.copytree(fixtures.FOLDERS["golden"], tmp_path / "golden")
    monkeypatch.setitem(fixtures.FOLDERS, "golden", stored)
    (stored / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"manifest\.json; run tools/pack_fixtures\.py"):
        fixtures.unpacked.__wrapped__("golden")


@pytest.mark.parametrize("name", fixtures.FOLDERS)
def test_packing_again_gives_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder, stored = fixtures.unpacked(name), fixtures.FOLDERS[name]
    monkeypatch.setitem(fixtures.FOLDERS, name, tmp_path)
    pack(folder, name)
    sums = fixtures.read_sums(tmp_path)
    assert sums == fixtures.read_sums(stored)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert fixtures.is_whole(fixtures.unpacked.__wrapped__(name), sums)


def test_all_tracked_files_of_the_tests_are_small() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "tests"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("this is no checkout of git")
    names = (path for path in listed.stdout.split("\0") if path and not path.endswith(".py"))
    paths = [ROOT / path for path in names]
    assert sum(path.stat().st_size for path in paths if path.is_file()) < MAX_BYTES
