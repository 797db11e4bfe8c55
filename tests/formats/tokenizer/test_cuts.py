"""Every way of cutting text that edgemerge knows a name for, in llama.cpp and in its own library.

tests/data/tokenizers/README.md says how the expected ids were made.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgemerge.formats.gguf.metadata import get_value
from edgemerge.formats.tokenizer.bpe import OTHER_NAMES
from edgemerge.formats.tokenizer.read import tokenizer_metadata
from edgemerge.runtime.llama import Model
from tests.support.architecture_models import ARCHITECTURES, convert, copy_model, facts
from tests.support.fixtures import read_json
from tests.support.places import TESTS
from tests.support.safetensors_files import read_safetensors, write_safetensors

TOKENIZERS = TESTS / "data" / "tokenizers"
CUTS = read_json(TOKENIZERS / "cuts.json.xz")
UNIGRAM = json.loads((TOKENIZERS / "unigram" / "expected.json").read_text())
# Model types in whose vocabularies llama.cpp's converter has another name for a cutting
FAMILIES = {other: model_type for (model_type, _), other in OTHER_NAMES.items()}


def model_with(tokenizer: dict[str, object] | Path, n_tokens: int, folder: Path) -> Path:
    """A small Qwen with another vocabulary, as GGUF."""
    model = copy_model("qwen3", {"vocab_size": n_tokens}, folder)
    if isinstance(tokenizer, Path):
        (model / "tokenizer.json").unlink()
        for path in (tokenizer, TOKENIZERS / "unigram" / "tokenizer_config.json"):
            shutil.copy(path, model / path.name)
    else:
        (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    tensors = read_safetensors(model / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = np.ones((n_tokens, tensors[name].shape[1]), np.float32)
    write_safetensors(model / "model.safetensors", tensors)
    return convert(model, folder / "model.gguf")


def cut_tokenizer(name: str) -> dict[str, object]:
    cut = CUTS["cuts"][name]
    tokenizer = CUTS["tokenizer"] | {"pre_tokenizer": cut["pre_tokenizer"]}
    tokenizer["model"] = tokenizer["model"] | {"ignore_merges": cut["ignore_merges"]}
    return tokenizer


@pytest.mark.parametrize("name", CUTS["cuts"])
def test_cuts(name: str, tmp_path: Path) -> None:
    model_type = FAMILIES.get(name, "qwen3")
    tokenizer = cut_tokenizer(name)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    n_tokens = len(CUTS["tokenizer"]["model"]["vocab"]) + 4
    found = tokenizer_metadata(tmp_path, {}, n_tokens, model_type)
    assert get_value(found, "tokenizer.ggml.pre") == name
    with Model(model_with(tokenizer, n_tokens, tmp_path), n_threads=1) as model:
        assert model.tokenize(CUTS["text"]) == CUTS["cuts"][name]["ids"]
        assert model.bos == []  # though llama.cpp adds one under some of these names


@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.json"])
def test_unigram(file: str, tmp_path: Path) -> None:
    path = TOKENIZERS / "unigram" / file
    with Model(model_with(path, 203, tmp_path), n_threads=1) as model:
        assert model.tokenize(UNIGRAM["text"]) == UNIGRAM["ids"]
        assert model.bos == []
        text = b"".join(model.piece(token) for token in UNIGRAM["ids"][:40])
        assert (
            text.decode()
            == " Permission is hereby granted, free of charge, to any person, 2024"[: len(text)]
        )


def test_sentencepiece_from_tokenizer_json(tmp_path: Path) -> None:
    """Gemma without tokenizer.model, which llama.cpp's converter cannot read."""
    model = copy_model("gemma3", {}, tmp_path)
    (model / "tokenizer.model").unlink()
    expected = facts("gemma3")
    with Model(convert(model, tmp_path / "model.gguf"), n_threads=1) as loaded:
        assert loaded.tokenize(expected["text"]) == expected["text_ids"]
    assert (ARCHITECTURES / "gemma3" / "tokenizer.model").is_file()
