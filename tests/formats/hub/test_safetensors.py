"""The safetensors header parser: the reference writer, hostile files, what else files can be."""

import json
import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from edgemerge.errors import FormatError
from edgemerge.formats import json_file
from edgemerge.formats.hub.safetensors import MAX_HEADER_BYTES, StoredTensor, read_header
from tests.support.places import TESTS

HOSTILE = TESTS / "data" / "hostile"
CASES = [
    case
    for case in json.loads((HOSTILE / "cases.json").read_text())
    if case["file"].endswith(".safetensors")
]


def write(path: Path, header: object, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | changes


def refusal(path: Path) -> str:
    with pytest.raises(FormatError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < len(str(path)) + 900
    return message


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    tensors: dict[str, np.ndarray] = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(4, dtype=np.float16),
        "scalar": np.array(3, dtype=np.int64),
        "empty": np.zeros((0, 5), np.float32),
    }
    path = tmp_path / "m.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert set(header) == set(tensors)
    raw = path.read_bytes()
    for name, array in tensors.items():
        found = header[name]
        assert (found.shape, found.nbytes) == (array.shape, array.nbytes)
        assert raw[found.offset : found.offset + found.nbytes] == array.tobytes()
    assert header["b"].dtype == "F32"
    assert header["scalar"].dtype == "I64"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["file"])
def test_hostile_file(case: dict[str, str]) -> None:
    path = HOSTILE / case["file"]
    if case["want"].startswith("refuse"):
        message = refusal(path)
        if "zip" in case["want"]:
            assert "PyTorch zip" in message
            assert "pickle" in message
    else:
        assert case["want"] == "accept"
        read_header(path)


def test_all_hostile_files_are_listed() -> None:
    assert {p.name for p in HOSTILE.glob("S*.safetensors")} == {case["file"] for case in CASES}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dtype": "F128"}, "dtype 'F128'"),
        ({"dtype": None}, "dtype"),
        ({"dtype": ["F32"]}, "dtype"),
        ({"shape": [2, 2.0]}, "shape"),
        ({"shape": [True, 4]}, "shape"),
        ({"shape": [-1, -4]}, "shape"),
        ({"shape": "22"}, "shape"),
        ({"shape": [1] * 65 + [4]}, "at most 64"),
        ({"shape": [1 << 62, 4]}, "larger than any file"),
        ({"shape": [0, 1 << 62, 1 << 62], "data_offsets": [0, 0]}, "larger than any file"),
        ({"shape": [2, 3]}, "needs 192 bits, it has 128"),
        ({"dtype": "F4", "shape": [33]}, "needs 132 bits"),
        ({"data_offsets": [0, 16.0]}, "data_offsets"),
        ({"data_offsets": [False, 16]}, "data_offsets"),
        ({"data_offsets": [0, 16, 16]}, "data_offsets"),
        ({"data_offsets": [16, 0]}, "data_offsets"),
        ({"data_offsets": None}, "data_offsets"),
        ({"data_offsets": [4, 20]}, "leaves a hole"),
        ({"data_offsets": [0, (1 << 63) + 8]}, "data_offsets"),
    ],
)
def test_refuses_a_bad_entry_by_name(tmp_path: Path, change: dict, says: str) -> None:
    message = refusal(write(tmp_path / "m.safetensors", {"w": entry(**change)}, bytes(16)))
    assert "tensor 'w'" in message
    assert says in message


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"": entry()}, "empty or holds a NUL"),
        ({"n" * 513: entry()}, "more than 512 bytes"),
        ({"a": entry(), "b": entry()}, "overlaps"),
        ({"a": entry(), "b": entry(data_offsets=[8, 24])}, "overlaps"),
        ({"a": 7}, "not an object"),
        ({"a": entry(), "__metadata__": {"x": 1}}, "__metadata__"),
        ({"a": entry(), "__metadata__": None}, "__metadata__"),
        (b'{"a":{"dtype":"F32","dtype":"F32"}}', "'dtype' appears twice"),
        (b'{"a":NaN}', "NaN"),
        (b'{"a":' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"{" + b'"a":{' * 100_000, "too deeply"),
        (b'{"a":' + b"[" * 100_000, "too deeply"),
        (b'{"a":1}' + b"\0" * 8, "not valid JSON"),
        (b'{"\xff":1}', "UTF-8"),
    ],
)
def test_refuses_a_bad_header(tmp_path: Path, header: object, says: str) -> None:
    assert says in refusal(write(tmp_path / "m.safetensors", header, bytes(16)))


def test_a_lone_surrogate_in_a_name_is_no_crash(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", b'{"\\ud800":{"dtype":"F9"}}')
    assert "dtype" in refusal(path)


def test_padding_after_the_header_is_allowed(tmp_path: Path) -> None:
    raw = json.dumps({"w": entry()}).encode() + b"   \n"
    header = read_header(write(tmp_path / "m.safetensors", raw, bytes(16)))
    assert header == {"w": StoredTensor("F32", (2, 2), 8 + len(raw), 16)}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git-LFS"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"\n  <html lang=en>", "web page"),
        (b"PK\x03\x04" + bytes(60), "PyTorch zip"),
        (b"\x80\x02}q\x00X\x05\x00\x00\x00helloq", "pickle"),
        (b"GGUF" + bytes(60), "GGUF"),
    ],
)
def test_says_what_else_the_file_is(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "m.safetensors").write_bytes(content)
    assert says in refusal(tmp_path / "m.safetensors")


def test_missing_file_directory_and_pipe(tmp_path: Path) -> None:
    assert "cannot be opened" in refusal(tmp_path / "none.safetensors")
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(tmp_path / "pipe")
    assert "not a regular file" in refusal(tmp_path)


def test_a_huge_header_costs_neither_time_nor_memory(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with path.open("wb") as file:  # sparse
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{")
        file.truncate(MAX_HEADER_BYTES + 100)
    assert "the most is" in refusal(path)
    start = time.perf_counter()
    many = write(tmp_path / "n.safetensors", b'{"a":[' + b"[]," * 2_000_000 + b"[]]}")
    assert "JSON values" in refusal(many)
    assert time.perf_counter() - start < 5


def test_json_files_are_bounded_and_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(FormatError, match="cannot be read"):
        json_file.read_object(path)
    path.write_bytes(b"[1]")
    with pytest.raises(FormatError, match="not an object"):
        json_file.read_object(path)
    path.write_bytes(b"\xff")
    with pytest.raises(FormatError, match="not UTF-8"):
        json_file.read_text(path)
    path.write_bytes(b"{}  ")
    with pytest.raises(FormatError, match="larger than"):
        json_file.read_object(path, max_bytes=3)


@given(data=st.binary(max_size=60), length=st.integers(0, 80))
def test_random_bytes_raise_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, length: int
) -> None:
    path = tmp_path_factory.mktemp("h") / "m.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{" + data)
    with pytest.raises(FormatError):
        read_header(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(
    header=st.dictionaries(
        st.text(max_size=4),
        JSON
        | st.fixed_dictionaries(
            {"dtype": JSON | st.just("F32"), "shape": JSON, "data_offsets": JSON}
        ),
        min_size=1,
    )
)
def test_random_headers_raise_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, header: dict
) -> None:
    path = write(tmp_path_factory.mktemp("h") / "m.safetensors", header)
    try:
        tensors = read_header(path)
    except FormatError:
        return
    assert all(tensor.nbytes == 0 for tensor in tensors.values())
