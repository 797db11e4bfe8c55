"""Where what can be made again is kept."""

from __future__ import annotations

import os
import pwd
import tempfile
from pathlib import Path
from typing import NoReturn

import pytest

from edgemerge.errors import OutputError
from edgemerge.machine.caches import users_cache


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder of a user whom neither the environment nor the system gives a home."""

    def unknown(uid: int) -> NoReturn:
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_user_without_a_home_has_a_folder(temporary: Path) -> None:
    """Fault: `podman run --user 12345` ended each merge with a RuntimeError of pathlib."""
    folder = users_cache()
    assert folder == temporary / f"edgemerge-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert users_cache() == folder


def test_it_is_nobody_elses(temporary: Path) -> None:
    """Kernels that lie there are run."""
    folder = temporary / f"edgemerge-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(OutputError, match="set HOME or XDG_CACHE_HOME"):
        users_cache()
    folder.rmdir()
    folder.symlink_to(temporary)
    with pytest.raises(OutputError, match="set HOME or XDG_CACHE_HOME"):
        users_cache()


def test_a_home_comes_first(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/anna")
    assert users_cache() == Path("/anna/.cache/edgemerge")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert users_cache() == Path("/caches/edgemerge")
