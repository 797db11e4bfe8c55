from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgemerge.errors import FormatError
from edgemerge.formats.gguf.header import align_up
from edgemerge.formats.gguf.metadata import SCALARS, decode_value, encode_value, get_value
from edgemerge.formats.gguf.model import GgufModel
from edgemerge.formats.gguf.writer import make_layout
from edgemerge.types import TensorSpec, UInt8

VALUES: dict[str, tuple[Any, str]] = {
    "general.architecture": ("llama", "str"),
    "t.u8": (255, "u8"),
    "t.i8": (-128, "i8"),
    "t.u16": (65535, "u16"),
    "t.i16": (-32768, "i16"),
    "t.u32": (4294967295, "u32"),
    "t.i32": (-2147483648, "i32"),
    "t.u64": (1 << 63, "u64"),
    "t.i64": (-(1 << 63), "i64"),
    "t.f32": (0.5, "f32"),
    "t.f64": (0.1, "f64"),
    "t.bool": (True, "bool"),
    "t.text": ("Grüße, 世界", "str"),
    "t.empty": ("", "str"),
    "t.words": (["a", "", "ß"], "[str]"),
    "t.ints": ([1, -2, 3], "[i32]"),
    "t.floats": ([0.25, -1.5], "[f32]"),
    "t.bools": ([True, False], "[bool]"),
}
RNG = np.random.default_rng(7)
# name -> row-major shape, ggml type; sizes that no alignment divides
TENSORS: dict[str, tuple[tuple[int, ...], str]] = {
    "one": ((1,), "F32"),
    "vector": ((7,), "F16"),
    "matrix": ((3, 5), "F32"),
    "blocks": ((3, 64), "Q8_0"),
    "superblocks": ((2, 256), "Q4_K"),
    "cube": ((2, 3, 4), "BF16"),
    "last": ((2, 2, 2, 2), "F32"),
}


def spec_of(name: str) -> TensorSpec:
    shape, dtype = TENSORS[name]
    block_len, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[dtype]]
    return TensorSpec(name, shape, dtype, int(np.prod(shape)) // block_len * block_bytes)


SPECS = {name: spec_of(name) for name in TENSORS}
DATA: dict[str, UInt8] = {
    name: RNG.integers(0, 256, spec.nbytes).astype(np.uint8) for name, spec in SPECS.items()
}


def write_ours(path: Path, *, alignment: int | None = None) -> Path:
    metadata = {key: encode_value(value, kind) for key, (value, kind) in VALUES.items()}
    if alignment is not None:
        metadata["general.alignment"] = encode_value(alignment, "u32")
    layout = make_layout(metadata, SPECS.values())
    content = bytearray(layout.n_bytes)
    content[: len(layout.header)] = layout.header
    for name, at in layout.offsets.items():
        content[at : at + SPECS[name].nbytes] = DATA[name].tobytes()
    path.write_bytes(content)
    return path


def write_theirs(path: Path, *, alignment: int | None = None) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    adders = {
        **{kind: getattr(writer, f"add_{name}") for kind, name in GGUF_PY.items()},
        **{f"[{kind}]": writer.add_array for kind in (*SCALARS, "str")},
    }
    adders["str"] = lambda key, text: writer.add_key_value(key, text, gguf.GGUFValueType.STRING)
    for key, (value, kind) in VALUES.items():
        if key != "general.architecture":
            adders[kind](key, value)
    for name, (shape, dtype) in TENSORS.items():
        raw: NDArray[Any] = DATA[name]
        rows = raw.reshape(*shape[:-1], -1)
        writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType[dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


GGUF_PY = {
    "u8": "uint8",
    "i8": "int8",
    "u16": "uint16",
    "i16": "int16",
    "u32": "uint32",
    "i32": "int32",
    "u64": "uint64",
    "i64": "int64",
    "f32": "float32",
    "f64": "float64",
    "bool": "bool",
}


def read_all(model: GgufModel, name: str) -> bytes:
    spec = model.specs()[name]
    out = np.empty(spec.nbytes, np.uint8)
    model.read_rows(name, 0, spec.n_rows, out)
    return out.tobytes()


# -- both directions against gguf-py ---------------------------------------------------------------


@pytest.mark.parametrize("alignment", [None, 64, 1024])
def test_gguf_py_reads_what_we_write(tmp_path: Path, alignment: int | None) -> None:
    reader = gguf.GGUFReader(write_ours(tmp_path / "ours.gguf", alignment=alignment))
    assert reader.alignment == (alignment or 32)
    for key, (value, _) in VALUES.items():
        assert reader.fields[key].contents() == value, key
    assert [tensor.name for tensor in reader.tensors] == list(TENSORS)
    for tensor in reader.tensors:
        shape, dtype = TENSORS[tensor.name]
        assert tuple(int(n) for n in reversed(tensor.shape)) == shape
        assert tensor.tensor_type.name == dtype
        assert tensor.data_offset % reader.alignment == 0
        assert tensor.data.tobytes() == DATA[tensor.name].tobytes()


@pytest.mark.parametrize("alignment", [None, 64])
def test_we_read_what_gguf_py_writes(tmp_path: Path, alignment: int | None) -> None:
    model = GgufModel(write_theirs(tmp_path / "theirs.gguf", alignment=alignment))
    assert model.architecture == "llama"
    assert model.specs() == SPECS
    assert list(model.specs()) == list(TENSORS)
    for key, (value, _) in VALUES.items():
        assert get_value(model.metadata(), key) == value, key
    assert get_value(model.metadata(), "general.alignment") == alignment
    assert {name: read_all(model, name) for name in SPECS} == {
        name: data.tobytes() for name, data in DATA.items()
    }
    model.close()


@pytest.mark.parametrize("key", [key for key in VALUES if not key.startswith("general.")])
def test_our_bytes_of_a_value_are_gguf_pys(tmp_path: Path, key: str) -> None:
    """Values pass from input to output as bytes, so the bytes themselves must agree."""
    model = GgufModel(write_theirs(tmp_path / "theirs.gguf"))
    assert model.metadata()[key] == encode_value(*VALUES[key])
    model.close()


@pytest.mark.parametrize("alignment", [None, 64])
def test_the_files_are_the_same_byte_for_byte(tmp_path: Path, alignment: int | None) -> None:
    """A header that we read and write again does not change; gguf-py sorts nothing either."""
    theirs = GgufModel(write_theirs(tmp_path / "theirs.gguf", alignment=alignment))
    layout = make_layout(theirs.metadata(), theirs.specs().values())
    content = theirs.path.read_bytes()
    assert content.startswith(layout.header)
    assert layout.n_bytes == len(content)
    theirs.close()


# -- details ---------------------------------------------------------------------------------------


def test_rows_are_read_one_by_one(tmp_path: Path) -> None:
    model = GgufModel(write_ours(tmp_path / "ours.gguf"))
    for name, spec in SPECS.items():
        whole = DATA[name].reshape(spec.n_rows, spec.row_bytes)
        for row in range(spec.n_rows):
            out = np.empty(spec.row_bytes, np.uint8)
            model.read_rows(name, row, row + 1, out)
            assert np.array_equal(out, whole[row]), (name, row)
        model.forget(name)
    model.close()


def test_version_2_is_read_and_version_1_is_not(tmp_path: Path) -> None:
    """Version 2 has version 3's layout; only big-endian files came with 3."""
    path = write_ours(tmp_path / "old.gguf")
    content = bytearray(path.read_bytes())
    content[4:8] = struct.pack("<I", 2)
    path.write_bytes(content)
    model = GgufModel(path)
    assert model.specs() == SPECS
    assert read_all(model, "last") == DATA["last"].tobytes()
    model.close()
    content[4:8] = struct.pack("<I", 1)
    path.write_bytes(content)
    with pytest.raises(FormatError, match="is GGUF version 1; only versions 2 and 3 are read"):
        GgufModel(path)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = write_ours(tmp_path / "ours.gguf")
    model = GgufModel(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 64)
    with pytest.raises(FormatError, match="the file ended while it was read") as caught:
        read_all(model, "last")
    assert caught.value.tensor == "last"
    model.close()


def test_layout_of_nothing() -> None:
    layout = make_layout({"general.architecture": encode_value("llama", "str")}, [])
    assert layout.offsets == {}
    assert layout.n_bytes == len(layout.header) == align_up(len(layout.header), 32)


def test_tensors_lie_behind_each_other_aligned() -> None:
    metadata = {"general.alignment": encode_value(64, "u32")}
    layout = make_layout(metadata, SPECS.values())
    at = len(layout.header)
    for name, spec in SPECS.items():
        assert layout.offsets[name] == at
        at = align_up(at + spec.nbytes, 64)
    assert layout.n_bytes == at


# -- typed values ----------------------------------------------------------------------------------


def numbers(kind: str) -> st.SearchStrategy[Any]:
    fmt = SCALARS[kind][1]
    if kind == "bool":
        return st.booleans()
    if kind.startswith("f"):
        return st.floats(width=32 if kind == "f32" else 64, allow_nan=False)
    bits = 8 * struct.calcsize(fmt)
    if kind.startswith("u"):
        return st.integers(0, 2**bits - 1)
    return st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


ELEMENTS = {kind: numbers(kind) for kind in SCALARS} | {"str": st.text()}


@given(
    st.sampled_from(sorted(ELEMENTS)).flatmap(
        lambda kind: st.tuples(st.just(kind), ELEMENTS[kind], st.lists(ELEMENTS[kind]))
    )
)
def test_values_survive_the_round_trip(case: tuple[str, Any, list[Any]]) -> None:
    kind, scalar, array = case
    assert decode_value(encode_value(scalar, kind)) == scalar
    assert decode_value(encode_value(array, f"[{kind}]")) == array


@given(st.binary())
def test_tokens_need_not_be_utf8(token: bytes) -> None:
    assert decode_value(encode_value(token, "str")) == token.decode("utf-8", "replace")


@given(st.floats(width=32))
def test_nan_and_infinity_keep_their_bits(value: float) -> None:
    raw = encode_value(value, "f32")
    decoded = decode_value(raw)
    assert isinstance(decoded, float)
    assert decoded == value or (np.isnan(decoded) and np.isnan(value))


def test_an_absent_key_has_the_default() -> None:
    assert get_value({}, "general.name") is None
    assert get_value({}, "general.name", "none") == "none"
