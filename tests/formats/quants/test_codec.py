"""The codec table: sizes of ggml's types, lazy kernels, and ggml's bytes exactly."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from edgemerge.formats.gguf.types import GGML_TYPES, block_size, row_bytes
from edgemerge.formats.quants.codec import CODECS, Codec
from tests.support import ggml_oracle
from tests.twins import codecs as reference

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
BLOCKS = hnp.arrays(np.float32, 256, elements=FINITE)
SMALL = hnp.arrays(np.float32, 256, elements=st.integers(-3, 3).map(float))

KINDS = {name: kind for kind, name in GGML_TYPES.items()}
WRITTEN = [name for name, codec in CODECS.items() if codec.can_encode]
LATTICE = [name for name in CODECS if name not in WRITTEN]
QUANTS = [name for name, codec in CODECS.items() if codec.block_len > 1]


@pytest.fixture(scope="module")
def ggml() -> object:
    if find_spec("llama_cpp") is None:  # importorskip would load the whole of llama.cpp
        pytest.skip("needs the shared library of ggml that llama-cpp-python ships")
    return ggml_oracle


@pytest.fixture(scope="module")
def exact_ggml(ggml: object) -> object:
    if ggml_oracle.fuses():
        pytest.skip("this libggml-base fuses a * b + c; build it with -ffp-contract=off")
    return ggml


def encode(codec: Codec, x: NDArray[np.float32]) -> NDArray[np.uint8]:
    out = np.full(x.size // codec.block_len * codec.block_bytes, 0xAA, np.uint8)
    codec.encode(x.ravel(), out, np.zeros(codec.scratch_len, np.float32))
    return out


def assert_ggml_bytes(name: str, x: NDArray[np.float32]) -> None:
    codec = CODECS[name]
    got, want = encode(codec, x), ggml_oracle.quantize(KINDS[name], x)
    wrong = (got != want).reshape(-1, codec.block_bytes).any(-1)
    assert np.flatnonzero(wrong).tolist() == [], f"of {wrong.size} blocks"


def assert_ggml_values(name: str, raw: NDArray[np.uint8]) -> None:
    codec = CODECS[name]
    got = np.full(raw.size // codec.block_bytes * codec.block_len, np.nan, np.float32)
    codec.decode(raw, got)
    want = ggml_oracle.dequantize(KINDS[name], raw)
    same = got.view(np.uint32) == want.view(np.uint32)
    assert (same | (np.isnan(got) & np.isnan(want))).all()


@pytest.mark.llama
@pytest.mark.parametrize("name", CODECS)
def test_decode_is_ggmls(ggml: object, name: str) -> None:
    codec = CODECS[name]
    rng = np.random.default_rng(5)
    random = rng.integers(0, 256, 2048 * codec.block_bytes, dtype=np.uint8)
    if codec.block_bytes == 2:  # every pattern there is
        random = np.arange(65536, dtype=np.uint16).view(np.uint8)
    encoded = encode(codec, reference.hard_rows(1024, seed=6)) if codec.can_encode else random[:0]
    for raw in (random, encoded):
        assert_ggml_values(name, raw)


@pytest.mark.llama
@pytest.mark.parametrize("name", QUANTS)
def test_decode_with_any_scale_is_ggmls(ggml: object, name: str) -> None:
    """Every third binary16 at every place where scales may stand, denormals and infinities too."""
    codec = CODECS[name]
    rng = np.random.default_rng(11)
    halves = np.arange(0, 65536, 3).astype("<u2").view(np.uint8).reshape(-1, 2)
    raw = rng.integers(0, 256, (len(halves), codec.block_bytes), dtype=np.uint8)
    for place in (slice(0, 2), slice(-2, None)):
        raw[:, place] = halves
        assert_ggml_values(name, raw.ravel())


@pytest.mark.llama
@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=60)
@given(data=st.data())
def test_decode_of_anything_is_ggmls(ggml: object, name: str, data: st.DataObject) -> None:
    n_bytes = CODECS[name].block_bytes * data.draw(st.integers(1, 9))
    assert_ggml_values(name, data.draw(hnp.arrays(np.uint8, n_bytes)))


@pytest.mark.llama
@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("seed", [7, 8])
def test_encode_is_ggmls(exact_ggml: object, name: str, seed: int) -> None:
    assert_ggml_bytes(name, reference.hard_rows(1024, seed))


@pytest.mark.llama
@pytest.mark.parametrize("name", WRITTEN)
def test_encode_of_weights_is_ggmls(exact_ggml: object, name: str) -> None:
    x = np.random.default_rng(9).standard_t(4, (64, 4096)).astype(np.float32) * np.float32(0.02)
    assert_ggml_bytes(name, x)


@pytest.mark.llama
@pytest.mark.parametrize("name", WRITTEN)
@settings(max_examples=60)
@given(x=BLOCKS | SMALL)
def test_encode_of_anything_finite_is_ggmls(
    exact_ggml: object, name: str, x: NDArray[np.float32]
) -> None:
    assert_ggml_bytes(name, x[None])


@pytest.mark.llama
@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_halves_of_any_pattern_are_ggmls(ggml: object, name: str) -> None:
    """A sample of all 2^32 floats, NaNs included: each upper half with three lower ones."""
    upper = np.arange(65536, dtype=np.uint32) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000):
        assert_ggml_bytes(name, (upper | np.uint32(lower)).view(np.float32).reshape(64, 1024))


@pytest.mark.llama
def test_sizes_are_ggmls(ggml: object) -> None:
    for kind, name in GGML_TYPES.items():
        traits = ggml_oracle.traits(kind)
        assert block_size(name) == (traits.block_len, traits.block_bytes), name


def test_sizes_are_those_of_gguf_py() -> None:
    for kind, size in gguf.GGML_QUANT_SIZES.items():
        if kind.name != "Q8_1":  # gguf-py says 40 bytes; ggml stores two halves and 32 bytes
            assert (GGML_TYPES[int(kind)], block_size(kind.name)) == (kind.name, size)


def test_sizes() -> None:
    assert block_size("Q4_K") == (256, 144)
    assert (CODECS["Q4_K"].block_len, CODECS["Q4_K"].block_bytes) == (256, 144)
    assert row_bytes("Q6_K", 4096) == 16 * 210
    assert row_bytes("F16", 7) == 14
    with pytest.raises(ValueError, match="whole number of Q4_K blocks"):
        row_bytes("Q4_K", 128)
    with pytest.raises(KeyError):
        block_size("Q4_2")


def test_types_that_ggml_removed_are_unknown() -> None:
    assert GGML_TYPES[0] == "F32"
    assert GGML_TYPES[12] == "Q4_K"
    assert not {4, 5, 31, 32, 33, 36, 37, 38} & set(GGML_TYPES)
    assert all(name == codec.dtype for name, codec in CODECS.items())


def test_every_type_of_weights_has_a_codec() -> None:
    not_weights = {"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"}
    assert set(CODECS) == set(GGML_TYPES.values()) - not_weights
    assert len(LATTICE) == 7
    assert all(name.startswith(("IQ1", "IQ2", "IQ3")) for name in LATTICE)


@pytest.mark.llama
def test_a_type_has_a_codec_where_ggml_makes_floats_of_it(ggml: object) -> None:
    known = {name for kind, name in GGML_TYPES.items() if ggml_oracle.traits(kind).to_float}
    assert set(CODECS) == known | {"F32"}


def test_lattice_types_are_not_written() -> None:
    with pytest.raises(AssertionError, match="IQ3_S is only read"):
        encode(CODECS["IQ3_S"], np.zeros(256, np.float32))


def test_lattice_types_need_no_gguf() -> None:
    """gguf-py has their tables, and takes 0.2 seconds to import."""
    code = (
        "import sys, numpy as np, edgemerge.formats.quants.codec as c;"
        "c.CODECS['IQ2_S'].decode(np.zeros(82, np.uint8), np.zeros(256, np.float32));"
        "assert 'gguf' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_importing_the_table_imports_no_numba() -> None:
    code = (
        "import sys, edgemerge.formats.quants.codec as c; c.CODECS['Q4_K'].block_bytes;"
        "assert not {'numba', 'llvmlite', 'gguf'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_f32_is_copied() -> None:
    x = np.array([0.0, -0.0, np.inf, 1e-45], np.float32)
    raw = encode(CODECS["F32"], x)
    assert raw.tobytes() == x.tobytes()
    back = np.empty_like(x)
    CODECS["F32"].decode(raw, back)
    assert back.tobytes() == x.tobytes()


def test_arrays_that_a_kernel_must_not_see_are_refused() -> None:
    codec = CODECS["Q8_0"]
    raw, values = np.zeros(68, np.uint8), np.zeros(64, np.float32)
    frozen = raw.copy()
    frozen.flags.writeable = False
    for bad in (raw[:-1], frozen, np.zeros(136, np.uint8)[::2], raw[:34]):
        with pytest.raises(AssertionError):
            codec.decode(bad, values)
    with pytest.raises(AssertionError):
        CODECS["F16"].decode(np.zeros(9, np.uint8)[1:], np.zeros(4, np.float32))
    with pytest.raises(AssertionError):
        CODECS["Q4_K"].encode(np.zeros(256, np.float32), np.zeros(144, np.uint8), values)
