"""A wheel that lacks a file of the tree, a notice, or brings something of its own, is refused."""

from __future__ import annotations

import zipfile
from collections.abc import Collection
from pathlib import Path

import pytest

from tools import check_wheel

NOTICES = {f"edgemerge-1.dist-info/licenses/{name}" for name in ("LICENSE", "THIRD_PARTY.md")}


def write(path: Path, names: Collection[str]) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "")
    return str(path)


def test_a_wheel_with_everything_passes(tmp_path: Path) -> None:
    assert check_wheel.main(write(tmp_path / "w.whl", check_wheel.expected_files() | NOTICES)) == 0


@pytest.mark.parametrize(
    "lost", ["edgemerge/py.typed", "edgemerge/kernels/ties.py", *sorted(NOTICES)]
)
def test_a_wheel_that_lacks_something_is_refused(
    lost: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = (check_wheel.expected_files() | NOTICES) - {lost}
    assert check_wheel.main(write(tmp_path / "w.whl", names)) == 1
    assert lost.rpartition("/")[2] in capsys.readouterr().err


def test_a_wheel_with_a_top_level_kernels_is_refused(tmp_path: Path) -> None:
    names = check_wheel.expected_files() | NOTICES | {"kernels/ties.py"}
    assert check_wheel.main(write(tmp_path / "w.whl", names)) == 1
