"""Directories as other tools leave them: trained heads beside tied ones, tokens of transformers 5.

`tools/make_odd_directories.py` asks transformers and llama.cpp's converter what these come to, and
tests/data/odd_directories.json keeps it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.fixtures import unpacked
from tests.support.places import TESTS
from tests.support.safetensors_files import Float32, read_safetensors, write_safetensors

EXPECTED = TESTS / "data" / "odd_directories.json"
ARCHITECTURES = unpacked("architectures")
BASE = unpacked("models") / "base"
SHOWN = 24  # logits of the last position that are kept
TEXT = "<|im_start|>user\nUnder Section5A of the Act, [TOOL] <think>why</think><|im_end|>"
SPECIAL, PLAIN = ("<|im_start|>", "<|im_end|>", "[TOOL]"), ("Section5A", "<think>", "</think>")
CHATML = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; `...` takes one out."""
    values = json.loads(path.read_text()) if path.is_file() else {}
    values |= changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def trained_head(embedding: Float32) -> Float32:
    """Return a head that was trained away from its embedding."""
    noise = np.random.default_rng(14).standard_normal(embedding.shape)
    return np.asarray(embedding * 1.25 + 0.05 * noise, np.float32)


def with_head(name: str, folder: Path, *, tied: bool, head: str | None) -> Path:
    """Copy a model of tests/data/architectures with another head.

    Parameters
    ----------
    name : str
        Of the model.
    folder : Path
        Where to.
    tied : bool
        What config.json says.
    head : {"trained", "equal", None}
        What is stored; None: no head.
    """
    target = shutil.copytree(ARCHITECTURES / name, folder / f"{name}-{tied}-{head}")
    tensors = read_safetensors(target / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors.pop("lm_head.weight", None)
    if head is not None:
        tensors["lm_head.weight"] = trained_head(embedding) if head == "trained" else embedding
    write_safetensors(target / "model.safetensors", tensors)
    edit_json(target / "config.json", tie_word_embeddings=tied)
    return target


def with_tokens(source: Path, folder: Path, *, grows: bool = True) -> Path:
    """Copy a model with tokens added, as transformers 5 saves it; `grows`: its embedding too."""
    target = shutil.copytree(source, folder)
    for path in target.iterdir():
        path.chmod(0o644)
    tokenizer = json.loads((target / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    first = max(*ids.values(), *tokenizer["model"]["vocab"].values()) + 1
    added = [text for text in SPECIAL + PLAIN if text not in ids]
    for i, text in enumerate(added, first):
        ids[text] = i
        tokenizer["added_tokens"].append(
            {
                "id": i,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": text in SPECIAL,
            }
        )
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    edit_json(
        target / "tokenizer_config.json",
        added_tokens_decoder=...,
        eos_token="<|im_end|>",
        extra_special_tokens=list(SPECIAL),
    )
    (target / "chat_template.jinja").write_text(CHATML)
    if grows:
        n_rows = first + len(added)
        edit_json(target / "config.json", vocab_size=n_rows, eos_token_id=ids["<|im_end|>"])
        tensors = read_safetensors(target / "model.safetensors")
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in tensors:
                rows = tensors[name]
                more = np.tile(rows.mean(axis=0), (max(0, n_rows - len(rows)), 1))
                tensors[name] = np.concatenate([rows, more.astype(np.float32)])
        write_safetensors(target / "model.safetensors", tensors)
    return target
