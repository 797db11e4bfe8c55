"""Every architecture that is read from a directory, against transformers and llama.cpp's converter.

tests/data/architectures/README.md says how the expected values were made.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgemerge.formats.hub.model import HubModel
from edgemerge.formats.quants.filetypes import tensor_types
from edgemerge.runtime.llama import Model
from tests.support.architecture_models import (
    ARCHITECTURES,
    CASES,
    NAMES,
    convert,
    copy_model,
    facts,
    logits,
)

# Which the converter forgets: llama.cpp does not look at the yarn_attn_factor that it writes, and takes
# mscale to be 1.
OURS = {
    ("qwen3", "yarn_attention"): ("qwen3.rope.scaling.attn_factor",),
    ("ministral3", "other_scale"): ("mistral3.rope.scaling.attn_factor",),
}
FROM_CONFIG = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture
def model(case: tuple[str, str], tmp_path: Path) -> Iterator[HubModel]:
    name, variant = case
    changes = facts(name)["converter"][variant]["config"]
    model = HubModel(copy_model(name, changes, tmp_path))
    yield model
    model.close()


def as_f32(model: HubModel, name: str) -> np.ndarray:
    spec = model.specs()[name]
    raw_u8 = np.empty(spec.nbytes, np.uint8)
    model.read_rows(name, 0, spec.n_rows, raw_u8)
    match spec.dtype:
        case "F32":
            return raw_u8.view("<f4")
        case "F16":
            return raw_u8.view("<f2").astype("<f4")
        case _:
            return (raw_u8.view("<u2").astype("<u4") << 16).view("<f4")


def test_metadata_is_the_converters(case: tuple[str, str], model: HubModel) -> None:
    name, variant = case
    expected = facts(name)["converter"][variant]["metadata"]
    found = dict(model.metadata())
    if variant != "plain":
        found = {k: v for k, v in found.items() if not k.startswith(("general.", "tokenizer."))}
    for key in OURS.get(case, ()):
        del found[key]
    assert list(found) == list(expected)
    for key, value in expected.items():
        raw = found[key]
        shown = f"sha256:{hashlib.sha256(raw).hexdigest()}" if len(raw) > 80 else raw.hex()
        assert shown == value, key


def test_tensors_are_the_converters(case: tuple[str, str], model: HubModel) -> None:
    name, variant = case
    expected = facts(name)["converter"][variant]["tensors"]
    names = list(model.specs())
    assert [n for n in names if variant == "plain" or n in FROM_CONFIG] == list(expected)
    types = tensor_types("F16", model.specs(), model.metadata(), model.architecture)
    for tensor, (shape, digest, *dtype) in expected.items():
        assert list(model.specs()[tensor].shape) == shape
        assert dtype in ([], [types[tensor]]), tensor
        values = as_f32(model, tensor)
        if tensor == "rope_freqs.weight":  # torch's powf may differ in the last place
            assert values[0] == pytest.approx(1.7359413)
            assert values[-1] == 8.0
        else:
            assert hashlib.sha256(values.tobytes()).hexdigest()[:32] == digest, tensor


def test_logits_are_those_of_transformers(
    case: tuple[str, str], model: HubModel, tmp_path: Path
) -> None:
    name, variant = case
    expected = facts(name)
    tokens, shown = expected["tokens"], expected["shown"]
    target = convert(model.path, tmp_path / "model.gguf")
    wanted = [i in shown for i in range(len(tokens))]
    with (
        Model(target, n_threads=1) as loaded,
        loaded.context(128, n_batch=64, n_outputs=len(shown), exact=True) as context,
    ):
        found = context.decode(tokens, wanted)
        np.testing.assert_allclose(found, logits(name, variant), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_the_tokenizer(name: str, tmp_path: Path) -> None:
    expected = facts(name)
    with Model(convert(ARCHITECTURES / name, tmp_path / "model.gguf"), n_threads=1) as model:
        assert model.tokenize(expected["text"]) == expected["text_ids"]
        for token, i in added_tokens(ARCHITECTURES / name):
            assert model.tokenize(token, special=True) == [i]
        template = model.chat_template
        assert template is not None
        assert "<|im_start|>{{ m['role'] }}" in template


def added_tokens(folder: Path) -> list[tuple[str, int]]:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    tokens = [(t["content"], int(i)) for i, t in config.get("added_tokens_decoder", {}).items()]
    if not tokens:
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokens = [(token["content"], token["id"]) for token in tokenizer["added_tokens"]]
    assert len(tokens) >= 2
    return tokens
