"""Tensors of a tiny model as transformers names and orders them, and what peft made of adapters on it."""

from __future__ import annotations

import json

import numpy as np
from numpy.typing import NDArray

from edgemerge.formats.architectures import hf_name
from tests.support.architecture_models import ARCHITECTURES
from tests.support.places import TESTS

Float32 = NDArray[np.float32]

ANSWERS: dict[str, dict[str, float]] = json.loads((TESTS / "data" / "adapters.json").read_text())[
    "answers"
]
HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
ROTATED = ("llama", "granite4")


def as_hub(base: str, architecture: str, tensors: dict[str, Float32]) -> dict[str, Float32]:
    """The tensors as transformers names and orders them."""
    config = json.loads((ARCHITECTURES / base / "config.json").read_text())
    found = {}
    for gguf, x in tensors.items():
        name = hf_name(architecture, gguf)
        if name is None:  # computed from the configuration
            continue
        module = name.split(".")[-2]
        if base in ROTATED and module in HEADS:
            heads = config[HEADS[module]]
            halves = x.reshape(heads, len(x) // heads // 2, 2, -1)
            x = halves.swapaxes(1, 2).reshape(x.shape)
        if base == "gemma3" and name.endswith("norm.weight"):
            x = x - np.float32(1)
        found[name] = x
    for name in [n for n in found if n.endswith("gate_proj.weight")]:
        front = name.removesuffix("gate_proj.weight")
        both = np.concatenate([found[name], found[f"{front}up_proj.weight"]], axis=-2)
        found[f"{front}gate_up_proj"] = both
        found[f"{front.replace('.mlp.', '.shared_mlp.')}input_linear.weight"] = both
        down = found[f"{front}down_proj.weight"]
        found[f"{front}down_proj"] = down
        found[f"{front.replace('.mlp.', '.shared_mlp.')}output_linear.weight"] = down
    if "lm_head.weight" not in found:
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    return found
