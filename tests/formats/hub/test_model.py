"""Hugging Face directories: against llama.cpp's converter (stored results), and what is refused."""

import hashlib
import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from edgemerge.errors import FormatError
from edgemerge.formats.gguf.metadata import get_value
from edgemerge.formats.hub.model import HubModel
from tests.support.fixtures import unpacked
from tests.support.packed_json import read_packed_json
from tests.support.places import TESTS

HUB = TESTS / "data" / "hub"
EXPECTED = read_packed_json(HUB / "expected.json.xz")
DIRECTORIES = {
    name: HUB / name
    for name in ("llama3", "smollm", "qwen_bias_sharded", "mistral_tekken", "gpt2_yarn")
} | {"base": unpacked("models") / "base"}


@pytest.fixture(params=DIRECTORIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(name: str) -> Iterator[HubModel]:
    model = HubModel(DIRECTORIES[name])
    yield model
    model.close()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A copy of a small model, to be spoilt."""
    return shutil.copytree(HUB / "llama3", tmp_path / "model")


def read(model: HubModel, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
    spec = model.specs()[name]
    stop = spec.n_rows if stop is None else stop
    raw_u8 = np.empty((stop - start) * spec.row_bytes, np.uint8)
    model.read_rows(name, start, stop, raw_u8)
    return raw_u8


def as_f32(raw_u8: np.ndarray, dtype: str) -> np.ndarray:
    match dtype:
        case "F32":
            return raw_u8.view("<f4")
        case "F16":
            return raw_u8.view("<f2").astype("<f4")
        case _:
            return (raw_u8.view("<u2").astype("<u4") << 16).view("<f4")


# What llama.cpp's converter makes of the same directories


def test_tensors_are_the_converters(name: str, model: HubModel) -> None:
    expected = EXPECTED[name]["tensors"]
    assert list(model.specs()) == list(expected)
    for tensor, (shape, digest) in expected.items():
        spec = model.specs()[tensor]
        assert (spec.name, list(spec.shape)) == (tensor, shape)
        x_f32 = as_f32(read(model, tensor), spec.dtype)
        if tensor == "rope_freqs.weight":  # torch's powf may differ in the last place
            assert x_f32[0] == 1.0
            assert x_f32[-1] == 8.0
        else:
            assert hashlib.sha256(x_f32.tobytes()).hexdigest()[:32] == digest, tensor


def test_metadata_is_the_converters(name: str, model: HubModel) -> None:
    expected, found = EXPECTED[name]["metadata"], dict(model.metadata())
    if name == "gpt2_yarn":  # the converter writes yarn_attn_factor, which llama.cpp does not read
        factor = get_value({"": found.pop("llama.rope.scaling.attn_factor")}, "")
        assert factor == pytest.approx(0.9 / (1 + 0.1 * math.log(4)))
    assert list(found) == list(expected)
    for key, value in expected.items():
        raw = found[key]
        shown = f"sha256:{hashlib.sha256(raw).hexdigest()}" if len(raw) > 80 else raw.hex()
        if key == "tokenizer.chat_templates" and name == "smollm":  # the converter lists a set
            assert get_value(found, key) == ["tool_use", "rag"]
        else:
            assert shown == value, key


def test_architecture_and_types() -> None:
    model = HubModel(HUB / "mistral_tekken")
    assert model.architecture == "llama"
    assert {spec.dtype for spec in model.specs().values()} == {"BF16"}
    assert "output.weight" in model.specs()
    model.close()


# Reading


def test_any_range_of_rows_is_that_slice(model: HubModel) -> None:
    rng = np.random.default_rng(0)
    for name, spec in model.specs().items():
        whole = read(model, name)
        for _ in range(6):
            start, stop = sorted(rng.integers(0, spec.n_rows + 1, 2).tolist())
            part = whole[start * spec.row_bytes : stop * spec.row_bytes]
            np.testing.assert_array_equal(read(model, name, start, stop), part)


def test_rotary_rows_every_range() -> None:
    """All starts and stops of one small q, against the converter's reshape and swap."""
    model = HubModel(HUB / "qwen_bias_sharded")
    for tensor, heads in (("attn_q", 4), ("attn_k", 2)):
        stored = load_shards(HUB / "qwen_bias_sharded")
        for suffix in ("weight", "bias"):
            x = stored[f"model.layers.1.self_attn.{tensor[-1]}_proj.{suffix}"]
            shape = (heads, 2, x.shape[0] // heads // 2, *x.shape[1:])
            x = x.reshape(shape).swapaxes(1, 2).reshape(x.shape)
            name = f"blk.1.{tensor}.{suffix}"
            rows = x if x.ndim == 2 else x[None]
            for start in range(len(rows)):
                for stop in range(start, len(rows) + 1):
                    got = read(model, name, start, stop).view(x.dtype)
                    np.testing.assert_array_equal(got, rows[start:stop].ravel())
    model.close()


def load_shards(directory: Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for shard in directory.glob("*.safetensors"):
        tensors |= load_file(shard)
    return tensors


def test_vectored_reads_of_any_length(model: HubModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may read less than asked for, anywhere; and takes only so many buffers at once."""
    whole = {name: read(model, name) for name in model.specs()}
    real = os.preadv

    def stingy(fd: int, buffers: list[memoryview], offset: int) -> int:
        assert len(buffers) <= 3
        first = buffers[:2] if len(buffers[0]) < 7 else [buffers[0][:7]]
        return real(fd, first, offset)

    monkeypatch.setattr("edgemerge.formats.files.IOV_MAX", 3)
    monkeypatch.setattr(os, "preadv", stingy)
    for name in list(whole)[-8:]:
        np.testing.assert_array_equal(read(model, name, 0, None), whole[name])


def test_threads_read_the_same(model: HubModel) -> None:
    whole = {name: read(model, name) for name in model.specs()}
    with ThreadPoolExecutor(8) as pool:
        for name, got in pool.map(lambda n: (n, read(model, n)), list(whole) * 3):
            np.testing.assert_array_equal(got, whole[name])


def test_forget_and_close_are_harmless(name: str) -> None:
    model = HubModel(DIRECTORIES[name])
    for tensor in model.specs():
        model.forget(tensor)
    first = next(iter(model.specs()))
    read(model, first)
    model.close()
    model.close()


def test_a_file_cut_while_it_is_read(directory: Path) -> None:
    model = HubModel(directory)
    os.truncate(directory / "model.safetensors", 5000)
    with pytest.raises(FormatError, match=r"model\.norm\.weight.*ended while it was read"):
        read(model, "output_norm.weight")
    model.close()


def test_no_rows_is_nothing(directory: Path) -> None:
    model = HubModel(directory)
    model.read_rows("blk.0.attn_q.weight", 3, 3, np.empty(0, np.uint8))
    model.close()
