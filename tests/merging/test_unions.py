"""Merges of models with tokens of their own: mergekit's rows, and transformers' ids of a text.

`tools/make_union_goldens.py` says how the expected values were made. mergekit takes models in no fixed order,
so new tokens are compared by their texts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import yaml

import edgemerge
from edgemerge.output.report import MergeReport
from edgemerge.provenance.inputs import check_inputs
from edgemerge.runtime.llama import Model
from tests.support.places import TESTS
from tests.support.safetensors_files import read_safetensors, write_safetensors
from tests.support.small_models import gguf_name, load_gguf
from tests.support.vocabularies import (
    CASES,
    EMBEDDING,
    HEAD,
    KINDS,
    TEXTS,
    edit,
    make_model,
    make_models,
    row_sums,
)

EXPECTED = json.loads((TESTS / "data" / "unions.json").read_text())


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind of vocabulary -> a folder of models."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in folders.items():
        make_models(kind, folder)
    return folders


@pytest.fixture(scope="module")
def files(
    directories: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The same models as GGUF, under the same names."""
    folders = {kind: tmp_path_factory.mktemp(f"{kind}-gguf") for kind in KINDS}
    for kind, folder in folders.items():
        for model in directories[kind].iterdir():
            recipe = edgemerge.make_recipe("passthrough", [(str(model), None)], out_type="F32")
            edgemerge.merge(recipe, folder / f"{model.name}.gguf")
            (folder / f"{model.name}.gguf").rename(folder / model.name)
    return folders


def tokens_of(path: Path) -> list[str]:
    tokens: list[str] = gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"].contents()
    return tokens


def merge(recipe: dict[str, Any], folder: Path, out: Path, **options: Any) -> MergeReport:
    out.with_suffix(".yml").write_text(yaml.safe_dump(recipe, allow_unicode=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return edgemerge.merge(edgemerge.load_recipe(out.with_suffix(".yml")), out, **options)


@pytest.mark.parametrize("form", ["directories", "files"])
@pytest.mark.parametrize("case", CASES)
def test_rows_are_mergekits_and_ids_are_transformers(
    case: str, form: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    kind, recipe = CASES[case]
    wanted, folder = EXPECTED[case], request.getfixturevalue(form)[kind]
    out = tmp_path / "out.gguf"
    report = merge(recipe, folder, out)
    first, tokens = wanted["first"], tokens_of(out)
    n_new = len(wanted["new"])
    assert sorted(tokens[first : first + n_new]) == sorted(wanted["new"])
    places = [*range(first), *(first + tokens[first:].index(text) for text in wanted["new"])]
    for name in (EMBEDDING, HEAD):
        if name not in wanted:
            continue
        rows = load_gguf(out)[gguf_name(name)]
        assert len(rows) == len(tokens) == wanted[name]["n_rows"]
        sums = row_sums(rows)
        assert sum(sums) == pytest.approx(wanted[name]["all"], rel=1e-5, abs=1e-4)
        last = [sums[i] for i in [*places, *range(first + n_new, len(sums))][first - 4 :]]
        assert last == pytest.approx(wanted[name]["last"], rel=1e-5, abs=1e-6)
    with Model(out, n_threads=1) as model:
        assert model.tokenize(TEXTS[kind], special=True) == [places[i] for i in wanted["ids"]]
        with model.context(32, n_batch=32, n_outputs=1) as context:
            last_tokens = [0, len(tokens) - 1]
            found = context.decode(last_tokens, [False, True])
            assert np.isfinite(found).all()
    check_inputs(out, [folder / name for name in report.models])


# -- normal tokens -----------------------------------------------------------------------------------


def grow_bpe(directory: Path) -> None:
    """Let a BPE learn two words more, the second of them by the first."""
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    model = tokenizer["model"]
    n_tokens = 1 + max(*model["vocab"].values(), *(t["id"] for t in tokenizer["added_tokens"]))
    for i, (left, right) in enumerate([("q", "x"), ("qx", "z")]):
        model["vocab"][left + right] = n_tokens + i
        model["merges"].append([left, right])
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    resize(directory, n_tokens + 2)


def grow_unigram(directory: Path) -> None:
    """Let a Unigram learn two pieces."""
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab += [["qx", -5.0], ["qxz", -5.5]]
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    resize(directory, len(vocab))


def resize(directory: Path, n_tokens: int) -> None:
    """Give a model without added tokens as many rows."""
    tensors = read_safetensors(directory / "model.safetensors")
    for name in (EMBEDDING, HEAD):
        more = np.full((n_tokens - len(tensors[name]), tensors[name].shape[1]), 0.25, np.float32)
        tensors[name] = np.concatenate([tensors[name], more])
    write_safetensors(directory / "model.safetensors", tensors)
    edit(directory / "config.json", vocab_size=n_tokens)


@pytest.mark.parametrize(
    ("kind", "grow"), [("bpe", grow_bpe), ("spm", grow_bpe), ("unigram", grow_unigram)]
)
def test_new_normal_tokens_are_made_of_text_as_in_their_own_model(
    kind: str, grow: Callable[[Path], None], tmp_path: Path
) -> None:
    """Their scores or merges come along; and another expert's added token gets its own id."""
    make_model(kind, tmp_path / "base", {}, 0)
    make_model(kind, tmp_path / "a", {"<|call|>": True}, 1)
    grow(make_model(kind, tmp_path / "b", {}, 2))
    base, own, out = (tmp_path / f"{name}.gguf" for name in ("x", "y", "z"))
    alone = {"merge_method": "passthrough", "models": [{"model": "b"}], "dtype": "float32"}
    merge(alone, tmp_path, own)
    merge(alone | {"models": [{"model": "base"}]}, tmp_path, base)
    inputs = [{"model": name, "parameters": {"weight": 0.5}} for name in ("base", "a", "b")]
    union = {"merge_method": "linear", "models": inputs, "tokenizer_source": "union"}
    merge(union | {"dtype": "float32"}, tmp_path, out)
    first = len(tokens_of(base))
    assert sorted(tokens_of(out)[first : first + 2]) == ["qx", "qxz"]
    assert tokens_of(out)[first + 2] == "<|call|>"
    with Model(own, n_threads=1) as wanted, Model(out, n_threads=1) as found:
        text = "The aqxz of bqx free"
        ids = wanted.tokenize(text)
        assert {first, first + 1} <= set(ids)
        assert found.tokenize(text) == ids
        assert first + 2 in found.tokenize(f"{text}<|call|>", special=True)
