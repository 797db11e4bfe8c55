#!/usr/bin/env python3
"""Make tests/data/drawn_families.json.xz: what transformers computes and llama.cpp's converter writes of
the models that tests/support/drawn_models.py draws.

    python -m tools.make_drawn_families LLAMA_CPP_SOURCE [NAME ...]

Needs torch, transformers, sentencepiece and gguf, as make_architecture_fixtures.py does.
"""

from __future__ import annotations

import json
import lzma
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch  # noqa: TID251
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: TID251

from tests.support.drawn_models import EXPECTED, TEXT, WEIGHTS, all_facts, write_model
from tests.support.safetensors_files import read_safetensors
from tools.drawn_shapes import SHAPES, DrawnShape
from tools.make_architecture_fixtures import convert, token_sequence

SHOWN = (13, 27)  # positions whose first logits are kept
N_LOGITS = 64


def describe(folder: Path, shape: DrawnShape, llama_cpp: Path) -> dict[str, Any]:
    """Return all that is stored of one family."""
    config = AutoConfig.for_model(shape.model_type, **shape.config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text()) | shape.config_added
    config_json = {k: v for k, v in saved.items() if k not in shape.config_removed}
    shapes = {name: list(x.shape) for name, x in read_safetensors(folder / WEIGHTS).items()}
    write_model(folder, config_json, shapes)
    tokens = token_sequence(shape.config["vocab_size"])
    converted = convert(folder, shape.pre, llama_cpp, "f32")
    types = convert(folder, shape.pre, llama_cpp, "f16")["tensors"]
    for name, (_, _, dtype) in types.items():
        n_dims, digest = converted["tensors"][name]
        converted["tensors"][name] = [n_dims, digest[:12], dtype]
    text_ids = AutoTokenizer.from_pretrained(folder).encode(TEXT, add_special_tokens=False)
    return {
        "config": config_json,
        "stored": shapes,
        "tokens": tokens,
        "logits": compute_logits(folder, tokens),
        "text_ids": list(text_ids),
        **converted,
    }


def compute_logits(folder: Path, tokens: list[int]) -> dict[int, list[float]]:
    """Return the first logits by position, of five digits after the point."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    print("  largest logit", np.abs(logits).max())
    return {i: [round(float(x), 5) for x in logits[i, :N_LOGITS]] for i in SHOWN}


def main() -> None:
    """Write the file, all of it or the families that are named."""
    llama_cpp = Path(sys.argv[1])
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    from conversion.base import ModelBase

    ModelBase.no_mtp = True  # layers that guess further tokens are left out
    known = all_facts() if EXPECTED.is_file() else {}
    for name in sys.argv[2:] or SHAPES:
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            known[name] = describe(Path(scratch) / name, SHAPES[name], llama_cpp)
    text = json.dumps({name: known[name] for name in SHAPES if name in known})
    EXPECTED.write_bytes(lzma.compress(text.encode(), preset=9))
    print(EXPECTED.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
