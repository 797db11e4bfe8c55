"""Output heads: stored beside a config.json that ties them, or not stored beside one that does not."""

import json
from pathlib import Path

import numpy as np
import pytest

from edgemerge.errors import FormatError
from edgemerge.formats.hub.model import HubModel
from edgemerge.runtime.llama import Model
from tests.support.architecture_models import NAMES, convert, facts, logits
from tests.support.odd_directories import EXPECTED, SHOWN, with_head

HEADS = json.loads(EXPECTED.read_text())["heads"]


def last_logits(folder: Path, target: Path, tokens: list[int]) -> np.ndarray:
    with (
        Model(convert(folder, target), n_threads=1) as loaded,
        loaded.context(128, n_batch=64, n_outputs=1, exact=True) as context,
    ):
        n = len(tokens)
        wanted = [i == n - 1 for i in range(n)]
        return context.decode(tokens, wanted)[0].copy()


@pytest.mark.parametrize("name", [name for name in NAMES if HEADS[name]["converter"]])
def test_a_trained_head_is_kept_though_config_json_ties_it(name: str, tmp_path: Path) -> None:
    folder = with_head(name, tmp_path, tied=True, head="trained")
    model = HubModel(folder)
    assert "output.weight" in model.specs()
    assert any("another one is stored, and kept" in note for note in model.notes())
    model.close()
    found = last_logits(folder, tmp_path / "x.gguf", facts(name)["tokens"])
    np.testing.assert_allclose(found[:SHOWN], HEADS[name]["logits"], rtol=0, atol=1e-3)


def test_what_llama_cpp_computes_tied_only_is_refused_with_another_head(tmp_path: Path) -> None:
    folder = with_head("gemma2", tmp_path, tied=True, head="trained")
    with pytest.raises(FormatError, match=r"'lm_head\.weight': differs from the embedding"):
        HubModel(folder)
    for tied, head in ((True, "equal"), (False, "equal"), (False, None)):
        model = HubModel(with_head("gemma2", tmp_path, tied=tied, head=head))
        assert "output.weight" not in model.specs()
        model.close()


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_moe"])
def test_an_equal_head_is_dropped_where_config_json_ties_it(name: str, tmp_path: Path) -> None:
    model = HubModel(with_head(name, tmp_path, tied=True, head="equal"))
    assert "output.weight" not in model.specs()
    assert not model.notes()
    model.close()


def test_a_model_of_no_head_is_tied_and_says_so(tmp_path: Path) -> None:
    folder = with_head("llama", tmp_path, tied=False, head=None)
    model = HubModel(folder)
    assert "output.weight" not in model.specs()
    assert [note for note in model.notes() if "none is stored; the embedding is used" in note]
    model.close()
    found = last_logits(folder, tmp_path / "x.gguf", facts("llama")["tokens"])
    np.testing.assert_allclose(found, logits("llama", "plain")[-1], rtol=0, atol=1e-3)


def test_olmo2_whose_head_llama_cpp_wants_gets_its_embedding(tmp_path: Path) -> None:
    """llama.cpp loads no OLMo 2 without `output.weight`."""
    tokens = facts("olmo2")["tokens"]
    tied = with_head("olmo2", tmp_path, tied=True, head=None)
    untied = with_head("olmo2", tmp_path, tied=False, head="equal")
    found, expected = (last_logits(d, tmp_path / f"{d.name}.gguf", tokens) for d in (tied, untied))
    np.testing.assert_array_equal(found, expected)
