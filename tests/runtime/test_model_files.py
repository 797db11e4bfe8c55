from __future__ import annotations

from pathlib import Path

import pytest

from edgemerge.errors import FormatError, RuntimeFailure
from edgemerge.runtime.model_files import model_files, open_gguf


def test_files_of_a_split_model(tmp_path: Path) -> None:
    names = [f"m-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    for name in names:
        (tmp_path / name).touch()
    assert model_files(tmp_path / names[0]) == [tmp_path / name for name in names]
    (tmp_path / names[2]).unlink()
    with pytest.raises(RuntimeFailure, match=f"{names[2]}: there is no such file, and {names[0]}"):
        model_files(tmp_path / names[0])


def test_files_of_a_model_in_one(tmp_path: Path) -> None:
    with pytest.raises(RuntimeFailure, match=r"m\.gguf: there is no such file"):
        model_files(tmp_path / "m.gguf")
    with pytest.raises(RuntimeFailure, match="is a folder; make a GGUF of it with edgemerge conv"):
        model_files(tmp_path)
    (tmp_path / "m.gguf").touch()
    assert model_files(tmp_path / "m.gguf") == [tmp_path / "m.gguf"]


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b"", "is empty, not a GGUF file; get it again"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a git-LFS pointer"),
        (b"Read me first.\n", "is not a GGUF file"),
    ],
)
def test_what_is_no_model_is_refused_by_its_header(
    tmp_path: Path, raw: bytes, sentence: str
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    with pytest.raises(FormatError, match=rf"m\.gguf: {sentence}"):
        open_gguf(path)
    path.unlink()
    with pytest.raises(RuntimeFailure, match="there is no such file"):
        open_gguf(path)


def test_a_model_that_is_cut_off_is_refused_by_its_header(tmp_path: Path, tiny_gguf: Path) -> None:
    open_gguf(tiny_gguf).close()
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:-100])
    with pytest.raises(FormatError, match="the download is cut off, get it again"):
        open_gguf(path)
