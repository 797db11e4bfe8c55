"""Split models: gguf-py writes the same files, llama.cpp's rules decide what is one model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest

from edgemerge.errors import FormatError
from edgemerge.formats import open_model
from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.formats.gguf.model import GgufModel
from edgemerge.formats.gguf.split import divide_tensors, part_paths, sibling_parts, whole_name
from edgemerge.formats.gguf.writer import make_layouts
from edgemerge.types import TensorSpec, UInt8

METADATA = {
    "general.architecture": encode_value("llama", "str"),
    "llama.block_count": encode_value(2, "u32"),
}
ROWS = {"a": 3, "b": 40, "c": 1, "d": 7, "e": 8}
DATA = {name: np.full((n, 16), i, np.float32) for i, (name, n) in enumerate(ROWS.items())}
SPECS = [TensorSpec(name, x.shape, "F32", x.nbytes) for name, x in DATA.items()]


def write_split(
    folder: Path, max_bytes: int = 600, metadata: Mapping[str, bytes] = METADATA
) -> list[Path]:
    layouts = make_layouts(metadata, SPECS, max_bytes)
    paths = part_paths(folder / "m.gguf", len(layouts))
    for path, layout in zip(paths, layouts, strict=True):
        content = bytearray(layout.n_bytes)
        content[: len(layout.header)] = layout.header
        for name, offset in layout.offsets.items():
            content[offset : offset + DATA[name].nbytes] = DATA[name].tobytes()
        path.write_bytes(content)
    return paths


def read_all(model: GgufModel, name: str) -> UInt8:
    spec = model.specs()[name]
    out = np.empty(spec.nbytes, np.uint8)
    model.read_rows(name, 0, spec.n_rows, out)
    model.forget(name)
    return out


def test_any_part_opens_the_whole(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    assert [path.name for path in paths] == [f"m-{i:05d}-of-00004.gguf" for i in (1, 2, 3, 4)]
    for path in paths:
        model = GgufModel(path)
        assert model.path == path
        assert model.architecture == "llama"
        assert list(model.specs()) == list(DATA)
        assert model.metadata().items() >= METADATA.items()
        for name, x in DATA.items():
            assert np.array_equal(read_all(model, name).view(np.float32), x.ravel())
        assert model.trailing_bytes == 0
        model.close()


def test_the_files_are_those_of_gguf_py(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    writer = gguf.GGUFWriter(theirs / "m.gguf", "llama", split_max_size=600)
    writer.add_uint32("llama.block_count", 2)
    for name, x in DATA.items():
        writer.add_tensor(name, x)
    writer.write_header_to_file(theirs / "m.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    paths = write_split(ours)
    assert sorted(path.name for path in theirs.iterdir()) == [path.name for path in paths]
    for path in paths:
        assert path.read_bytes() == (theirs / path.name).read_bytes()


def test_tensors_are_divided_as_gguf_split_divides_them() -> None:
    def names(max_bytes: int) -> list[str]:
        return ["".join(spec.name for spec in part) for part in divide_tensors(SPECS, max_bytes)]

    assert names(1 << 30) == ["abcde"]
    assert names(3 * 64 + 40 * 64) == ["ab", "cde"]
    assert names(3 * 64 + 40 * 64 - 1) == ["a", "bc", "de"]
    assert names(1) == list("abcde")
    odd = [TensorSpec(name, (5,), "F32", 20) for name in "xyz"]  # padded to 32 bytes
    assert [len(part) for part in divide_tensors(odd, 64)] == [2, 1]


@pytest.mark.parametrize("kept", [0, 2])
def test_missing_parts_are_named(tmp_path: Path, kept: int) -> None:
    paths = write_split(tmp_path)
    others = [path for i, path in enumerate(paths) if i != kept]
    for path in others:
        path.unlink()
    with pytest.raises(FormatError, match=rf"is part {kept + 1} of a split of 4, and") as caught:
        open_model(paths[kept])
    assert all(path.name in str(caught.value) for path in others)
    assert paths[kept].name not in str(caught.value).partition(":")[2]


def test_a_renamed_part_is_refused(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    odd = tmp_path / "other.gguf"
    paths[0].rename(odd)
    with pytest.raises(FormatError, match=r"there is no other-00001-of-00004\.gguf"):
        open_model(odd)
    shutil.copy(paths[2], paths[0])
    with pytest.raises(FormatError, match=r"is part 3 of 4, which its name does not"):
        open_model(paths[0])


def test_parts_of_different_splits_are_refused(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    part = paths[3].read_bytes()
    paths[3].write_bytes(paths[2].read_bytes())
    with pytest.raises(FormatError, match="does not state that it is part 4 of 4"):
        open_model(paths[0])
    number = part.index(b"split.no") + len(b"split.no") + 4
    twice = bytearray(paths[2].read_bytes())
    twice[number : number + 2] = (3).to_bytes(2, "little")
    paths[3].write_bytes(twice)
    with pytest.raises(FormatError, match="stands in another part too") as caught:
        open_model(paths[0])
    assert caught.value.tensor == "c"
    paths[3].write_bytes(part.replace(b"e\0\0\0", b"f\0\0\0"))
    open_model(paths[0]).close()
    first = bytearray(paths[0].read_bytes())
    total = first.index(b"split.tensors.count") + len(b"split.tensors.count") + 4
    first[total] = 9
    paths[0].write_bytes(first)
    with pytest.raises(FormatError, match="states 9 tensors in all its parts, which hold 5"):
        open_model(paths[1])


@pytest.mark.parametrize(
    ("number", "count"),
    [((9, "u16"), (4, "u16")), ((-1, "i32"), (4, "u16")), ((0, "u16"), (1 << 40, "u64"))],
)
def test_an_impossible_place_is_refused(
    tmp_path: Path, number: tuple[int, str], count: tuple[int, str]
) -> None:
    place = {"split.no": encode_value(*number), "split.count": encode_value(*count)}
    (layout,) = make_layouts({**METADATA, **place}, [], None)
    path = tmp_path / "m-00001-of-00004.gguf"
    path.write_bytes(layout.header)
    with pytest.raises(FormatError, match="which cannot be"):
        open_model(path)


def test_names() -> None:
    path = Path("folder/m.v1-00002-of-00003.gguf")
    assert whole_name(path) == "m.v1.gguf"
    assert [str(part) for part in sibling_parts(path)] == [
        f"folder/m.v1-0000{i}-of-00003.gguf" for i in (1, 2, 3)
    ]
    for name in ("m.gguf", "m-1-of-3.gguf", "m-00001-of-00003.gguf.part", "model"):
        assert whole_name(Path(name)) == name
        assert sibling_parts(Path(name)) == [Path(name)]
