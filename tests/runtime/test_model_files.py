from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edgemerge.errors import FormatError, RuntimeFailure
from edgemerge.formats.gguf.model import parts_of
from edgemerge.merging.run import merge
from edgemerge.recipe.recipe import make_recipe
from edgemerge.runtime.model_files import model_files, open_gguf
from tests.support.open_gguf import load_base


def test_files_of_a_split_model(tmp_path: Path, tiny_gguf: Path) -> None:
    paths = [tmp_path / f"m-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    merge(
        make_recipe("passthrough", [(str(tiny_gguf), None)]),
        tmp_path / "m.gguf",
        split_bytes=90_000,
    )
    assert model_files(paths[0]) == model_files(paths[2]) == paths
    paths[2].unlink()
    with pytest.raises(
        FormatError, match=f"beside it there is no {paths[2].name}; get the missing"
    ):
        model_files(paths[0])


def test_files_of_a_model_in_one(tmp_path: Path, tiny_gguf: Path) -> None:
    with pytest.raises(RuntimeFailure, match=r"m\.gguf: there is no such file"):
        model_files(tmp_path / "m.gguf")
    with pytest.raises(RuntimeFailure, match="is a folder; make a GGUF of it with edgemerge conv"):
        model_files(tmp_path)
    assert model_files(tiny_gguf) == [tiny_gguf]


@pytest.mark.parametrize("name", ["m-00001-of-00013.gguf", "m-00001-of-00001.gguf"])
def test_a_whole_file_named_like_a_part(tmp_path: Path, tiny_gguf: Path, name: str) -> None:
    path = tmp_path / name
    shutil.copy(tiny_gguf, path)
    assert model_files(path) == parts_of(path) == [path]


def test_parts_joined_by_cat(tmp_path: Path, tiny_gguf: Path) -> None:
    recipe = make_recipe("passthrough", [(str(tiny_gguf), None)])
    parts = [
        Path(file.path) for file in merge(recipe, tmp_path / "m.gguf", split_bytes=90_000).files
    ]
    joined = tmp_path / "joined.gguf"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(
        FormatError, match="is a part of a split of 3 with another one joined to it"
    ):
        open_gguf(joined)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("general.type", "adapter", "is a LoRA adapter, not a model; .* with --lora to run"),
        ("general.type", "mmproj", r"is the part of a model that sees or hears \(mmproj\)"),
        ("general.architecture", "clip", r"is the part of a model that sees or hears \(mmproj\)"),
        ("general.type", "imatrix", "is an importance matrix, not a model; give it with --imatrix"),
        ("general.architecture", "controlvector", "is a control vector, not a model"),
    ],
)
def test_a_gguf_that_is_no_model_is_named(
    tmp_path: Path, tiny_gguf: Path, key: str, value: str, sentence: str
) -> None:
    model = load_base(tiny_gguf)
    model.set(key, value, "str")
    path = model.write(tmp_path / "other.gguf")
    with pytest.raises(FormatError, match=sentence):
        open_gguf(path)
    for recipe in (
        make_recipe("passthrough", [(str(path), None)]),
        make_recipe("linear", [(str(tiny_gguf), None), (str(path), None)]),
    ):
        with pytest.raises(FormatError, match=sentence):
            merge(recipe, tmp_path / "out.gguf")


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
