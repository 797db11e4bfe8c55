"""Families whose tiny models are drawn in the test, against transformers and llama.cpp's converter.

`tests/support/drawn_models.py` says where the right values come from.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgemerge.formats.hub.model import HubModel
from edgemerge.formats.quants.filetypes import tensor_types
from edgemerge.merging.run import merge
from edgemerge.recipe.recipe import make_recipe
from edgemerge.runtime.llama import Model
from tests.support.architecture_models import convert
from tests.support.drawn_models import TEXT, all_facts, make_directory

FACTS = all_facts()


@pytest.fixture(params=FACTS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(name: str, tmp_path: Path) -> Path:
    return make_directory(name, tmp_path / name)


@pytest.fixture
def model(folder: Path) -> Iterator[HubModel]:
    model = HubModel(folder)
    yield model
    model.close()


def read_f32(model: HubModel, name: str, step: int) -> np.ndarray:
    """All values of a tensor, read `step` rows at a time."""
    spec = model.specs()[name]
    raw_u8 = np.empty(spec.nbytes, np.uint8)
    for start in range(0, spec.n_rows, step):
        stop = min(spec.n_rows, start + step)
        first, last = start * spec.row_bytes, stop * spec.row_bytes
        model.read_rows(name, start, stop, raw_u8[first:last])
    if spec.dtype == "BF16":
        return (raw_u8.view("<u2").astype("<u4") << 16).view("<f4")
    return raw_u8.view("<f4")


def test_metadata_is_the_converters(name: str, model: HubModel) -> None:
    expected, found = FACTS[name]["metadata"], model.metadata()
    assert list(found) == list(expected)
    for key, value in expected.items():
        raw = found[key]
        shown = f"sha256:{hashlib.sha256(raw).hexdigest()}" if len(raw) > 80 else raw.hex()
        assert shown == value, key


@pytest.mark.parametrize("step", [3, 1 << 20])
def test_tensors_are_the_converters(name: str, model: HubModel, step: int) -> None:
    expected, specs = FACTS[name]["tensors"], model.specs()
    assert list(specs) == list(expected)
    types = tensor_types("F16", specs, model.metadata(), model.architecture)
    for tensor, (shape, digest, dtype) in expected.items():
        assert (list(specs[tensor].shape), types[tensor]) == (shape, dtype), tensor
        values = read_f32(model, tensor, step)
        assert hashlib.sha256(values.tobytes()).hexdigest()[:12] == digest, tensor


def decode(path: Path, tokens: list[int], shown: list[int]) -> np.ndarray:
    """(shown, n_vocab) float32: logits at some positions."""
    n = len(tokens)
    with (
        Model(path, n_threads=1) as loaded,
        loaded.context(128, n_batch=64, n_outputs=len(shown), exact=True) as context,
    ):
        return context.decode(tokens, range(n), [(0,)] * n, [i in shown for i in range(n)]).copy()


def test_logits_are_those_of_transformers(name: str, folder: Path, tmp_path: Path) -> None:
    expected = FACTS[name]
    found = decode(
        convert(folder, tmp_path / "x.gguf"), expected["tokens"], [*map(int, expected["logits"])]
    )
    for row, right in zip(found, expected["logits"].values(), strict=True):
        np.testing.assert_allclose(row[: len(right)], right, rtol=0, atol=1e-3)


def test_tokens_are_those_of_the_tokenizer(name: str, folder: Path, tmp_path: Path) -> None:
    with Model(convert(folder, tmp_path / "x.gguf"), n_threads=1) as model:
        assert model.tokenize(TEXT) == FACTS[name]["text_ids"]


@pytest.mark.parametrize(("method", "out_type"), [("linear", "Q4_K_M"), ("ties", "F16")])
def test_two_experts_merge_and_run(
    name: str, folder: Path, method: str, out_type: str, tmp_path: Path
) -> None:
    experts = [make_directory(name, tmp_path / f"{seed}", seed=seed) for seed in (1, 2)]
    recipe = make_recipe(
        method,
        [(str(path), None) for path in experts],
        base=str(folder) if method == "ties" else None,
        out_type=out_type,
    )
    target = tmp_path / "merged.gguf"
    merge(recipe, target, threads=1)
    assert np.isfinite(decode(target, FACTS[name]["tokens"], [27])).all()
