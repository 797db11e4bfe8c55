from __future__ import annotations

from pathlib import Path

import pytest

from edgemerge.errors import RuntimeFailure
from edgemerge.runtime.model_files import model_files


def test_files_of_a_split_model(tmp_path: Path) -> None:
    names = [f"m-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    for name in names:
        (tmp_path / name).touch()
    assert model_files(tmp_path / names[0]) == [tmp_path / name for name in names]
    (tmp_path / names[2]).unlink()
    with pytest.raises(RuntimeFailure, match=f"{names[2]}: there is no such file"):
        model_files(tmp_path / names[0])


def test_files_of_a_model_in_one(tmp_path: Path) -> None:
    with pytest.raises(RuntimeFailure, match=r"m\.gguf: there is no such file"):
        model_files(tmp_path / "m.gguf")
    with pytest.raises(RuntimeFailure, match="is a folder; make a GGUF of it with edgemerge conv"):
        model_files(tmp_path)
    (tmp_path / "m.gguf").touch()
    assert model_files(tmp_path / "m.gguf") == [tmp_path / "m.gguf"]
