"""A folder of wheels that does not fit its lists, or tells where it was built, is refused."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from tools import check_targets
from tools.list_wheels import requirements

BUILDER = "/build/edgemerge/"
NUMPY = "numpy-2.4.6-cp311-cp311-manylinux_2_27_aarch64.manylinux_2_28_aarch64.whl"


def write_wheel(path: Path, text: str, date: tuple[int, int, int, int, int, int]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("module.py", date), text)


def write_list(folder: Path) -> None:
    """The list and the bill of materials of what the folder has, as `tools/wheels` makes them."""
    rows = requirements(folder)
    (folder / "aarch64-3.11.txt").write_text("\n".join(rows) + "\n")
    parts = []
    for row in rows:
        name, _, rest = row.partition("==")
        version, _, digest = rest.partition(" --hash=sha256:")
        reference = {"hashes": [{"alg": "SHA-256", "content": digest}]}
        parts.append({"name": name, "version": version, "externalReferences": [reference]})
    (folder / "aarch64-3.11.cdx.json").write_text(json.dumps({"components": parts}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_wheel(tmp_path / "edgemerge-0.1.0-py3-none-any.whl", "own", check_targets.FIRST_DATE)
    write_wheel(tmp_path / NUMPY, f"other {BUILDER}", (2026, 1, 1, 0, 0, 0))
    write_list(tmp_path)
    return tmp_path


def test_a_folder_that_fits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_targets.main(folder, [BUILDER]) == 0
    assert capsys.readouterr() == ("aarch64-3.11: 2 wheels, 0 MB\n", "")


def test_a_folder_that_does_not(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = folder / "edgemerge-0.1.0-py3-none-any.whl"
    write_wheel(changed, BUILDER, (2026, 1, 1, 0, 0, 0))
    assert check_targets.main(folder, [BUILDER]) == 1
    said = capsys.readouterr().err
    assert "edgemerge: no wheel here has its hash" in said
    assert f"{changed.name}: is in no list" in said
    assert f"{changed.name}: 1 files have dates of their own (module.py)" in said
    assert f"{changed.name}: 1 files name {BUILDER} (module.py)" in said


def test_a_bill_of_materials_that_lacks_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bill = folder / "aarch64-3.11.cdx.json"
    parts = json.loads(bill.read_text())["components"]
    bill.write_text(json.dumps({"components": parts[1:]}))
    assert check_targets.main(folder) == 1
    assert "edgemerge==0.1.0 is in one of list and bill" in capsys.readouterr().err


def test_a_folder_without_lists_is_refused(tmp_path: Path) -> None:
    assert check_targets.main(tmp_path) == 1


@pytest.mark.parametrize(
    ("tag", "fits"),
    [
        ("py3-none-any", True),
        ("cp312-cp312-manylinux_2_28_aarch64", True),
        ("cp311-abi3-manylinux_2_17_aarch64", True),
        ("py3-none-manylinux_2_35_aarch64", True),
        ("cp313-abi3-manylinux_2_17_aarch64", False),
        ("cp311-cp311-manylinux_2_28_aarch64", False),
        ("cp312-cp312-manylinux_2_28_x86_64", False),
        ("cp312-cp312-musllinux_1_2_aarch64", False),
        ("py2-none-any", False),
    ],
)
def test_tags_of_a_target(tag: str, fits: bool) -> None:
    interpreter, abi, platform = tag.split("-")
    assert check_targets.fits(interpreter, abi, platform, "aarch64-3.12") is fits
