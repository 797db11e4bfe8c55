"""Codec kernels against their slow twins, whatever the cut into blocks, scratch or thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from edgemerge.formats.quants.codec import CODECS, Codec
from tests.twins import codecs as reference
from tests.twins import few_bits as reference_codecs
from tests.twins import lattice as reference_lattice

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

PACKED = [name for name, codec in CODECS.items() if codec.kernels]
WRITTEN = [name for name in PACKED if CODECS[name].can_encode]
LATTICE = [name for name in PACKED if name not in WRITTEN]
TILED = [name for name, codec in CODECS.items() if codec.scratch_len]

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
BLOCKS = hnp.arrays(np.float32, 256, elements=FINITE)
SMALL = hnp.arrays(np.float32, 256, elements=st.sampled_from([-2.0, -1.0, -0.0, 0.0, 0.5, 1.0]))


def twin(direction: str, name: str) -> Callable[[NDArray[Any]], NDArray[Any]]:
    wanted = f"{direction}_{name.lower()}"
    modules = (reference_codecs, reference, reference_lattice)
    module = next(module for module in modules if hasattr(module, wanted))
    function: Callable[[NDArray[Any]], NDArray[Any]] = getattr(module, wanted)
    return function


def encode(codec: Codec, x: NDArray[np.float32], fill: float = 0.0) -> NDArray[np.uint8]:
    out = np.full(x.size // codec.block_len * codec.block_bytes, 0xAA, np.uint8)
    codec.encode(x.ravel(), out, np.full(codec.scratch_len, fill, np.float32))
    return out


def decode(codec: Codec, raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    out = np.full(raw.size // codec.block_bytes * codec.block_len, np.nan, np.float32)
    codec.decode(raw, out)
    return out


def random_bytes(codec: Codec, n_blocks: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(codec.block_bytes)
    return rng.integers(0, 256, n_blocks * codec.block_bytes, dtype=np.uint8)


def assert_same_floats(left: NDArray[np.float32], right: NDArray[np.float32]) -> None:
    """The same bits; any NaN equals any other."""
    same = left.view(np.uint32) == right.view(np.uint32)
    assert (same | (np.isnan(left) & np.isnan(right))).all()


@pytest.mark.parametrize("name", PACKED)
def test_decode_is_the_twins(name: str) -> None:
    raw = random_bytes(CODECS[name], 512)
    assert_same_floats(decode(CODECS[name], raw), twin("decode", name)(raw))


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_every_half_decodes_as_its_twin(name: str) -> None:
    raw = np.arange(65536, dtype=np.uint16).view(np.uint8)
    assert_same_floats(decode(CODECS[name], raw), twin("decode", name)(raw))


@pytest.mark.parametrize("name", WRITTEN)
def test_encode_is_the_twins(name: str) -> None:
    x = reference.hard_rows(256)
    size = CODECS[name].block_bytes * 256 // CODECS[name].block_len
    wrong = (encode(CODECS[name], x) != twin("encode", name)(x.ravel())).reshape(-1, size)
    assert np.flatnonzero(wrong.any(-1)).tolist() == []


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_halves_round_ties_to_even_and_keep_infinity(name: str) -> None:
    halves = np.arange(65536, dtype=np.uint16).view(np.uint8)
    exact = decode(CODECS[name], halves)
    exact = exact[np.isfinite(exact)]
    with np.errstate(over="ignore"):
        between = (exact[:-1].astype(np.float64) + exact[1:].astype(np.float64)) / 2
    nearby = between.astype(np.float32)
    x = np.concatenate([exact, nearby, np.nextafter(nearby, 0), np.nextafter(nearby, np.inf)])
    x = x[np.isfinite(x)].astype(np.float32)
    assert (encode(CODECS[name], x) == twin("encode", name)(x)).all()
    infinite = np.array([np.inf, -np.inf], np.float32)
    assert decode(CODECS[name], encode(CODECS[name], infinite)).tolist() == [np.inf, -np.inf]


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_nan_stays_quiet_nan(name: str) -> None:
    nans = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF], np.uint32)
    bits = encode(CODECS[name], nans.view(np.float32)).view(np.uint16)
    assert np.isnan(decode(CODECS[name], bits.view(np.uint8))).all()
    assert ((bits & (0x0200 if name == "F16" else 0x0040)) != 0).all()
    assert ((bits >> 15) == (nans >> 31)).all()


@pytest.mark.parametrize("name", WRITTEN)
def test_any_cut_into_blocks_gives_the_same_bytes(name: str) -> None:
    codec = CODECS[name]
    x = reference.hard_rows(256, seed=1)
    whole = encode(codec, x)
    for n_rows in (1, 3, 16):
        cut = [encode(codec, x[i : i + n_rows].copy()) for i in range(0, len(x), n_rows)]
        assert (np.concatenate(cut) == whole).all()
    values = decode(codec, whole)
    parts = [decode(codec, part.copy()) for part in np.split(whole, len(x))]
    assert_same_floats(np.concatenate(parts), values)


@pytest.mark.parametrize("name", PACKED)
def test_any_cut_into_blocks_gives_the_same_values(name: str) -> None:
    """Kernels may take several blocks at a time: the last ones are the same."""
    codec = CODECS[name]
    raw = random_bytes(codec, 23)
    whole = decode(codec, raw)
    for n in (1, 2, 3, 5, 7):
        size = n * codec.block_bytes
        parts = [decode(codec, raw[i : i + size].copy()) for i in range(0, raw.size, size)]
        assert_same_floats(np.concatenate(parts), whole)
    assert decode(codec, raw[:0].copy()).size == 0


@pytest.mark.parametrize("name", LATTICE)
def test_points_of_a_lattice_are_the_twins(name: str) -> None:
    """Every byte at every place, with and without what stands beside it."""
    codec = CODECS[name]
    raw = np.zeros((4, codec.block_bytes, 256, codec.block_bytes), np.uint8)
    raw[1] = 0xFF
    raw[2:] = random_bytes(codec, 2).reshape(2, 1, 1, -1) & 0x3F
    places = np.arange(codec.block_bytes)
    raw[:, places, :, places] = np.arange(256, dtype=np.uint8)
    assert_same_floats(decode(codec, raw.ravel()), twin("decode", name)(raw.ravel()))


@pytest.mark.parametrize("name", TILED)
def test_scratch_leaves_no_trace(name: str) -> None:
    x = reference.hard_rows(256, seed=2)[:21]  # the last tile is not full
    expected = encode(CODECS[name], x, fill=0.0)
    for fill in (np.nan, np.inf, 1e-42, -3e38):
        assert (encode(CODECS[name], x, fill=fill) == expected).all()


@pytest.mark.parametrize("name", TILED)
def test_threads_give_the_same_bytes(name: str) -> None:
    x = np.random.default_rng(3).standard_normal((8, 8192), dtype=np.float32)
    expected = [encode(CODECS[name], row) for row in x]
    with ThreadPoolExecutor(4) as pool:
        for got, want in zip(pool.map(lambda r: encode(CODECS[name], r), x), expected, strict=True):
            assert (got == want).all()


@pytest.mark.parametrize("name", WRITTEN)
@settings(max_examples=25)
@given(x=BLOCKS | SMALL)
def test_any_block_encodes_as_its_twin(name: str, x: NDArray[np.float32]) -> None:
    got, want = encode(CODECS[name], x), twin("encode", name)(x)
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1"])
@pytest.mark.parametrize("zeros", [(0.0, -0.0), (-0.0, 0.0)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_of_zeros_with_both_signs_the_first_is_the_extreme(
    name: str, zeros: tuple[float, float], sign: float
) -> None:
    x = sign * np.tile(np.arange(1, 33, dtype=np.float32), 8)
    x[5::32], x[20::32] = zeros
    assert encode(CODECS[name], x).tolist() == twin("encode", name)(x).tolist()


@pytest.mark.parametrize("name", ["Q2_K", "Q4_K", "Q5_K"])
def test_sub_blocks_of_almost_one_value_are_the_twins(name: str) -> None:
    """The spread of what the search takes for a minimum may vanish, and the quants with it."""
    rng = np.random.default_rng(5)
    level = np.repeat(rng.standard_normal(512) * 10.0 ** rng.uniform(-44, 30, 512), 16)
    noise = rng.standard_normal(level.size) * np.repeat(10.0 ** rng.uniform(-9, 0, 512), 16)
    x = (level * (1 + noise)).astype(np.float32)
    assert np.array_equal(encode(CODECS[name], x), twin("encode", name)(x))


STEPS = {"Q4_0": 15, "Q4_1": 15, "Q5_0": 31, "Q5_1": 31, "Q8_0": 254}
STEPS |= {"Q2_K": 3, "Q3_K": 7, "Q4_K": 15, "Q5_K": 31, "Q6_K": 63}
STEPS |= {"IQ4_NL": 10, "IQ4_XS": 10, "MXFP4": 8, "NVFP4": 8, "TQ1_0": 2, "TQ2_0": 2}


@pytest.mark.parametrize(("name", "steps"), STEPS.items())
def test_values_come_back_within_a_step(name: str, steps: int) -> None:
    x = np.random.default_rng(4).uniform(-1, 1, 8192).astype(np.float32)
    error = np.abs(decode(CODECS[name], encode(CODECS[name], x)) - x).max()
    assert error < 1.25 * 2 / steps


@pytest.mark.parametrize("name", TILED)
def test_the_table_knows_the_scratch_of_the_kernel(name: str) -> None:
    kernels = pytest.importorskip(f"edgemerge.kernels.{CODECS[name].kernels}")
    assert CODECS[name].scratch_len == kernels.SCRATCH_LEN


def test_levels_of_iq4_part_halfway_and_nan_gets_the_highest() -> None:
    iq4 = pytest.importorskip("edgemerge.kernels.iq4")
    levels = np.array(iq4.LEVELS, np.float32)
    halfway = (levels[:-1] + levels[1:]) / np.float32(2)
    below, above = np.nextafter(halfway, -np.inf), np.nextafter(halfway, np.inf)
    x = np.concatenate(
        [halfway, below, above, levels, np.array([np.nan, np.inf, -np.inf, -0.0], np.float32)]
    )
    wanted = reference_codecs.nearest_level(x)
    assert wanted[: len(levels)].tolist() == [*range(1, 16), 0]
    assert [iq4._index(v) for v in x] == wanted.tolist()
    assert [iq4._nearest(v) for v in x] == levels[wanted].tolist()


@pytest.mark.parametrize(("name", "n"), [("MXFP4", 32), ("NVFP4", 64)])
def test_scales_of_fp4_near_powers_of_two(name: str, n: int) -> None:
    """ggml takes the exponent off a logarithm in float32, which rounds up just below a power."""
    powers = np.arange(0, 255, dtype=np.int64)[:, None] << 23
    bits = (powers + np.arange(-50, 50)).clip(1, 0x7F7FFFFF).astype(np.uint32)
    largest = np.concatenate(
        [bits.view(np.float32).ravel(), np.linspace(1e-3, 3e3, 9999, dtype="f")]
    )
    x = (largest[:, None] * np.linspace(-1, 1, n)).astype(np.float32)
    wrong = (encode(CODECS[name], x) != twin("encode", name)(x.ravel())).reshape(len(x), -1)
    assert largest[wrong.any(-1)].tolist() == []
