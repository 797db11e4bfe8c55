#!/usr/bin/env python3
"""Make tests/data/generated_models.json.xz: what transformers computes and llama.cpp's converter writes of
the models of tests/support/generated_models.py.

    python -m tools.make_generated_models LLAMA_CPP_SOURCE [NAME ...]

Needs torch, transformers, sentencepiece and gguf, as make_architecture_fixtures.py does.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch  # noqa: TID251
from sentencepiece import SentencePieceProcessor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: TID251

from tests.support.generated_models import (
    EXPECTED,
    EXPECTED_TOO,
    WEIGHTS,
    all_facts,
    write_model,
)
from tests.support.packed_json import write_packed_json
from tests.support.safetensors_files import read_safetensors
from tools.generated_shapes import SHAPES, GeneratedShape, with_packed_experts
from tools.make_architecture_fixtures import TEXT, convert, token_sequence
from tools.more_generated_shapes import MORE_SHAPES

SHOWN = (13, 27)  # positions whose logits are kept
N_SHOWN = 16  # logits of each


def describe(folder: Path, shape: GeneratedShape, llama_cpp: Path) -> dict[str, Any]:
    """Return all that is stored of one model."""
    config = AutoConfig.for_model(shape.model_type, **shape.config)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text()) | shape.config_added
    config_json = {k: v for k, v in saved.items() if k not in shape.config_removed}
    shapes = {name: list(x.shape) for name, x in read_safetensors(folder / WEIGHTS).items()}
    if shape.packs_experts:
        shapes = with_packed_experts(shapes)
    variants: dict[str, dict[str, Any]] = {"plain": {}, **shape.variants}
    tokens = token_sequence(shape.config["vocab_size"])
    found = {}
    for variant, changes in variants.items():
        write_model(folder, config_json | changes, shapes)
        logits = compute_logits(folder, tokens)
        answers = {"logits": logits, **run_converter(folder, shape.pre, llama_cpp)}
        found[variant] = {"config": changes, **answers}
    text = shape.text or TEXT
    if (folder / "tokenizer.model").is_file():
        text_ids = SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode(text)
    else:
        text_ids = AutoTokenizer.from_pretrained(folder).encode(text, add_special_tokens=False)
    return {
        "config": config_json,
        "stored": shapes,
        "tokens": tokens,
        "text": text,
        "text_ids": list(text_ids),
        "variants": found,
    }


def run_converter(folder: Path, pre: str, llama_cpp: Path) -> dict[str, Any]:
    """Return metadata and tensors: shape, the beginning of the hash in F32, type in F16."""
    converted = convert(folder, pre, llama_cpp, "f32")
    types = convert(folder, pre, llama_cpp, "f16")["tensors"]
    for name, (_, _, dtype) in types.items():
        shape, digest = converted["tensors"][name]
        converted["tensors"][name] = [shape, digest[:8], dtype]
    return converted


def compute_logits(folder: Path, tokens: list[int]) -> dict[int, list[float]]:
    """Return some logits by position, of four digits after the point."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    print("  largest logit", np.abs(logits).max())
    return {i: [round(float(x), 4) for x in logits[i, :N_SHOWN]] for i in SHOWN}


def main() -> None:
    """Write the file, all of it or the models that are named."""
    llama_cpp = Path(sys.argv[1])
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    from conversion.base import ModelBase

    ModelBase.no_mtp = True  # layers that guess further tokens are left out
    known = all_facts()
    for path, shapes in ((EXPECTED, SHAPES), (EXPECTED_TOO, MORE_SHAPES)):
        asked = [name for name in sys.argv[2:] or shapes if name in shapes]
        for name in asked:
            print(name, flush=True)
            with tempfile.TemporaryDirectory() as scratch:
                known[name] = describe(Path(scratch) / name, shapes[name], llama_cpp)
        if asked:
            write_packed_json(path, {name: known[name] for name in shapes if name in known})
            print(path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
