"""Encoders with an importance matrix: ggml's bytes, the twins', and no trace of scratch or cuts."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from edgemerge.formats.gguf.types import GGML_TYPES, row_bytes
from edgemerge.formats.quants.codec import CODECS
from edgemerge.formats.quants.weighted import WEIGHTED_SCRATCH, WEIGHTED_TYPES
from tests.support import ggml_oracle
from tests.twins import codecs as reference
from tests.twins import weighted as reference_weighted

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

Float32 = NDArray[np.float32]
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
WEIGHTS = hnp.arrays(
    np.float32, 256, elements=st.floats(0, width=32, allow_nan=False, allow_infinity=False)
)
NAMES = sorted(WEIGHTED_TYPES)
KINDS = {name: kind for kind, name in GGML_TYPES.items()}


def uneven(n_cols: int, seed: int = 0) -> Float32:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(n_cols) ** 2 * np.exp(2 * rng.standard_normal(n_cols))).astype(
        np.float32
    )


def some_zero(n_cols: int) -> Float32:
    importance = uneven(n_cols, 1)
    importance[np.random.default_rng(2).random(n_cols) < 0.5] = 0
    importance[:64] = 0
    return importance


IMPORTANCES: dict[str, Callable[[int], Float32]] = {
    "uneven": uneven,
    "even": lambda n_cols: np.ones(n_cols, np.float32),
    "none": lambda n_cols: np.zeros(n_cols, np.float32),
    "some none": some_zero,
    "tiny": lambda n_cols: uneven(n_cols) * np.float32(1e-38),
    "huge": lambda n_cols: np.minimum(uneven(n_cols), 1e3) * np.float32(1e35),
}


def encode(name: str, x: Float32, importance: Float32, fill: float = 0.0) -> NDArray[np.uint8]:
    out = np.full(len(x) * row_bytes(name, x.shape[1]), 0xAA, np.uint8)
    scratch = np.full(WEIGHTED_SCRATCH, fill, np.float32)
    CODECS[name].encode(x.ravel(), out, scratch, importance)
    return out


def wrong_blocks(name: str, got: NDArray[np.uint8], want: NDArray[np.uint8]) -> list[int]:
    bad = (got != want).reshape(-1, CODECS[name].block_bytes).any(-1)
    return [int(i) for i in np.flatnonzero(bad)]


@pytest.fixture(scope="module")
def ggml() -> None:
    if find_spec("llama_cpp") is None:  # importorskip would load the whole of llama.cpp
        pytest.skip("needs the shared library of ggml that llama-cpp-python ships")
    if ggml_oracle.fuses():
        pytest.skip("this libggml-base fuses a * b + c; build it with -ffp-contract=off")


@pytest.mark.llama
@pytest.mark.usefixtures("ggml")
@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_ggmls(name: str, importance: str) -> None:
    normal = np.random.default_rng(4).standard_normal((9, 2304)).astype(np.float32) / np.float32(50)
    for x in (reference.hard_rows(256, seed=3), normal):  # a row is less than a step, and more
        weights = IMPORTANCES[importance](x.shape[1])
        got = encode(name, x, weights)
        assert wrong_blocks(name, got, ggml_oracle.quantize(KINDS[name], x, weights)) == []


@pytest.mark.llama
@pytest.mark.usefixtures("ggml")
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=100)
@given(x=hnp.arrays(np.float32, (1, 256), elements=FINITE), weights=WEIGHTS)
def test_anything_finite(name: str, x: Float32, weights: Float32) -> None:
    got = encode(name, x, weights)
    assert wrong_blocks(name, got, ggml_oracle.quantize(KINDS[name], x, weights)) == []


@pytest.mark.llama
@pytest.mark.usefixtures("ggml")
@pytest.mark.parametrize("name", [name for name in NAMES if CODECS[name].block_len == 32])
def test_rows_that_are_no_multiple_of_256(name: str) -> None:
    x, weights = reference.hard_rows(288, seed=5), uneven(288)
    got = encode(name, x, weights)
    assert wrong_blocks(name, got, ggml_oracle.quantize(KINDS[name], x, weights)) == []


@pytest.mark.llama
@pytest.mark.usefixtures("ggml")
def test_ggml_takes_no_notice_of_importances_in_the_other_types() -> None:
    x, weights = reference.hard_rows(256, seed=6), uneven(256)
    others = [c.dtype for c in CODECS.values() if c.can_encode and c.dtype not in WEIGHTED_TYPES]
    assert {"Q8_0", "MXFP4", "TQ1_0"} < set(others)
    for name in others:
        with_weights = ggml_oracle.quantize(KINDS[name], x, weights)
        assert (with_weights == ggml_oracle.quantize(KINDS[name], x)).all(), name


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_the_twins(name: str) -> None:
    twin = getattr(reference_weighted, f"encode_{name.lower()}")
    x = reference.hard_rows(256, seed=7)
    for weights in (uneven(256), some_zero(256)):
        assert wrong_blocks(name, encode(name, x, weights), twin(x, weights)) == []


@pytest.mark.parametrize("name", NAMES)
def test_neither_scratch_nor_cuts_leave_a_trace(name: str) -> None:
    x, weights = reference.hard_rows(512, seed=8), uneven(512)
    whole = encode(name, x, weights)
    for n_rows, fill in ((1, np.nan), (3, np.inf), (16, -3e38)):
        cuts = range(0, len(x), n_rows)
        parts = [encode(name, x[i : i + n_rows].copy(), weights, fill) for i in cuts]
        assert (np.concatenate(parts) == whole).all()


@pytest.mark.parametrize("name", NAMES)
def test_important_columns_come_out_closer(name: str) -> None:
    """The point of it all, on values that a normal distribution gives."""
    codec = CODECS[name]
    rng = np.random.default_rng(9)
    x = rng.standard_normal((64, 1024)).astype(np.float32)
    weights = np.where(rng.random(1024) < 0.1, 50.0, 0.1).astype(np.float32)
    plain = np.empty(x.size // codec.block_len * codec.block_bytes, np.uint8)
    codec.encode(x.ravel(), plain, np.empty(codec.scratch_len, np.float32))
    losses = []
    for raw in (plain, encode(name, x, weights)):
        y = np.empty(x.size, np.float32)
        codec.decode(raw, y)
        losses.append(float((weights * (y.reshape(x.shape) - x) ** 2).sum()))
    assert losses[1] < 0.9 * losses[0]
