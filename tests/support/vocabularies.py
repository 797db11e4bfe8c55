"""Small models of one family with tokens of their own; also run by tools/make_union_goldens.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.fixtures import unpacked
from tests.support.places import TESTS
from tests.support.safetensors_files import Float32, read_safetensors, write_safetensors

UNIGRAM = TESTS / "data" / "tokenizers" / "unigram"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FAMILY = "qwen3"
# Kind of vocabulary -> whose files of it the small model gets instead of its own
KINDS = {"bpe": None, "spm": unpacked("models") / "base", "unigram": UNIGRAM}
TEXTS = {
    "bpe": "<|call|>The Software[Lab] shall<|call|>[Lab2] be <think>free</think> of charge",
    "spm": "<|call|>the Software[Lab] shall<|call|>[Lab2]be <think>free</think> of charge",
    "unigram": "Permission is<|call|>hereby [Lab]granted<|call|>free[Lab2]of charge",
}
# What the experts add, in their own order: text -> whether it is special
ADDED: dict[str, dict[str, bool]] = {
    "base": {},
    "a": {"[Lab]": False, "<|call|>": True},
    "b": {"<|call|>": True, "<think>": False, "</think>": False},
    "c": {"[Lab2]": False, "[Lab]": False},
    "other": {"<|call|>": True, "[Lab2]": False, "[Lab3]": False},
}
# Case -> kind, and the recipe's keys; all models are named as above.
CASES: dict[str, tuple[str, dict[str, Any]]] = {}


def _linear(*names: str) -> dict[str, Any]:
    return {
        "merge_method": "linear",
        "models": [
            {"model": n, "parameters": {"weight": 0.2 + 0.1 * i}} for i, n in enumerate(names)
        ],
        "dtype": "float32",
    }


for _kind in KINDS:
    CASES[f"{_kind} union"] = (
        _kind,
        _linear("base", "a", "b", "c") | {"base_model": "base", "tokenizer": {"source": "union"}},
    )
CASES |= {
    "without a base": ("bpe", _linear("a", "b", "c") | {"tokenizer_source": "union"}),
    "of one model": ("bpe", _linear("a", "b", "c") | {"tokenizer": {"source": "b"}}),
    "of the base": (
        "bpe",
        {
            "merge_method": "task_arithmetic",
            "base_model": "base",
            "models": [{"model": n, "parameters": {"weight": 0.4}} for n in "ab"],
            "tokenizer_source": "base",
            "dtype": "float32",
        },
    ),
    "of another model": (
        "bpe",
        {
            "merge_method": "ties",
            "base_model": "a",
            "models": [{"model": n, "parameters": {"weight": 0.4, "density": 1}} for n in "bc"],
            "tokenizer": {"source": "other"},
            "dtype": "float32",
        },
    ),
    "rules": (
        "spm",
        {
            "merge_method": "slerp",
            "base_model": "base",
            "models": [{"model": "base"}, {"model": "a"}],
            "parameters": {"t": 0.3},
            "tokenizer": {
                "source": "union",
                "pad_to_multiple_of": 16,
                "tokens": {
                    "<|call|>": {"source": "a"},
                    "[Lab]": {"source": {"kind": "zero"}},
                    "[new]": {
                        "source": {"kind": "model_token", "model": "a", "token": "[Lab]"},
                        "force": True,
                    },
                    "[two]": {"source": {"kind": "model_token", "model": "base", "token_id": 77}},
                    "▁the": {"source": "base", "force": True},
                },
            },
            "dtype": "float32",
        },
    ),
    "slices": (
        "bpe",
        {
            "merge_method": "passthrough",
            "slices": [
                {"sources": [{"model": "a", "layer_range": [0, 1]}]},
                {"sources": [{"model": "b", "layer_range": [1, 2]}]},
            ],
            "tokenizer_source": "union",
            "dtype": "float32",
        },
    ),
}


def make_models(kind: str, folder: Path) -> None:
    """Make a directory for each entry of `ADDED`; none has padding."""
    for seed, (name, added) in enumerate(ADDED.items()):
        make_model(kind, folder / name, added, seed)


def make_model(kind: str, target: Path, added: Mapping[str, bool], seed: int) -> Path:
    """Make a fine-tune of a small model whose vocabulary has these tokens at its end.

    Parameters
    ----------
    kind : str
        A key of `KINDS`.
    target : Path
        The directory to make.
    added : mapping
        Text -> whether it is special.
    seed : int
        Of the noise and of the rows of new tokens; 0 is the base.
    """
    shutil.copytree(unpacked("architectures") / FAMILY, target)
    if (source := KINDS[kind]) is not None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(source / name, target / name)
    n_tokens = add_tokens(target, added)
    tensors = read_safetensors(target / "model.safetensors")
    rng, core = np.random.default_rng(seed), np.random.default_rng(1000)
    for name, tensor in tensors.items():
        if name in (EMBEDDING, HEAD):
            n_cols, n_first = tensor.shape[1], n_tokens - len(added)
            shared = core.standard_normal((n_first, n_cols)) * 0.5
            tensor = np.concatenate([shared, rng.standard_normal((len(added), n_cols)) * 0.5])
        noise = 0.05 * rng.standard_normal(tensor.shape) if seed else 0.0
        tensors[name] = (tensor + noise).astype(np.float32)
    write_safetensors(target / "model.safetensors", tensors)
    edit(target / "config.json", vocab_size=n_tokens, torch_dtype="float32", dtype="float32")
    return target


def add_tokens(directory: Path, added: Mapping[str, bool]) -> int:
    """Add tokens to the files of a tokenizer; return how many there are in all."""
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    config = json.loads((directory / "tokenizer_config.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    ids = range(len(vocab)) if isinstance(vocab, list) else vocab.values()
    first = 1 + max(*ids, *(token["id"] for token in tokenizer["added_tokens"]))
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for i, (text, special) in enumerate(added.items(), first):
        token = plain | {"content": text, "special": special}
        tokenizer["added_tokens"].append({"id": i, **token})
    named = {key: config.get(key) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    named["tokenizer_class"] = (
        "PreTrainedTokenizerFast"  # any other may add tokens that no file has
    )
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps(named))
    return first + len(added)


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def row_sums(rows: Float32) -> list[float]:
    """Return a fixed random sum of each row: two rows with one sum are one row."""
    factors = np.random.default_rng(7).standard_normal(rows.shape[1])
    return [float(f"{value:.7g}") for value in rows.astype(np.float64) @ factors]
