#!/usr/bin/env python3
"""Make tests/data/odd_kinds.json.xz: the headers that llama.cpp's converter writes for tiny models that are
no plain decoders. The weights are not kept: tests/support/odd_kinds.py draws them.

    python -m tools.make_odd_kinds LLAMA_CPP_SOURCE

Needs torch and transformers.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch  # noqa: TID251
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText  # noqa: TID251  # noqa: TID251

sys.path.insert(1, sys.argv[1])
sys.path.insert(1, f"{sys.argv[1]}/gguf-py")  # before another gguf is imported
import gguf
from conversion import get_model_class

from tests.support.odd_kinds import HEADERS, N_TOKENS
from tests.support.packed_json import write_packed_json

COMMON: dict[str, Any] = {
    "vocab_size": N_TOKENS,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA_2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_d_conv": 4,
}
SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# name -> model_type, what differs from COMMON (None: is left out), the class that makes it
KINDS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "granite hybrid": (
        "granitemoehybrid",
        {
            **MAMBA_2,
            "mamba_d_head": 64,
            "hidden_size": 256,  # rows that K-quants take
            "intermediate_size": 256,
            "shared_intermediate_size": 256,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": True,
        },
        AutoModelForCausalLM,
    ),
    "falcon-h1": (
        "falcon_h1",
        {**MAMBA_2, "mamba_d_ssm": 128, "head_dim": 16, "key_multiplier": 0.5},
        AutoModelForCausalLM,
    ),
    "mamba": (
        "mamba",
        {"state_size": 16, "conv_kernel": 4, "expand": 2, "intermediate_size": None},
        AutoModelForCausalLM,
    ),
    "lfm2 moe": (
        "lfm2_moe",
        {
            **SPARSE,
            "layer_types": ["conv", "full_attention"],
            "num_dense_layers": 1,
            "conv_L_cache": 3,
            "use_expert_bias": True,
            "tie_word_embeddings": True,
        },
        AutoModelForCausalLM,
    ),
    "qwen2 moe": (
        "qwen2_moe",
        {**SPARSE, "shared_expert_intermediate_size": 64},
        AutoModelForCausalLM,
    ),
    "gpt-oss": (
        "gpt_oss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        AutoModelForCausalLM,
    ),
    "qwen3-vl": (
        "qwen3_vl",
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 2, 2],
            },
        },
        AutoModelForImageTextToText,
    ),
    "bert": ("bert", {"num_key_value_heads": None}, AutoModel),
}
TOWER = {
    "depth": 1,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_heads": 4,
    "out_hidden_size": 64,
    "deepstack_visual_indexes": [0],
}


def convert(name: str, folder: Path) -> dict[str, Any]:
    """Make a model, run the converter, and describe the header that it wrote."""
    model_type, changes, kind = KINDS[name]
    settings = {k: v for k, v in (COMMON | changes).items() if v is not None}
    if kind is AutoModelForImageTextToText:
        settings = {"text_config": settings, "vision_config": TOWER}
    config = AutoConfig.for_model(model_type, **settings)
    kind.from_config(config, dtype=torch.float32).save_pretrained(folder)
    if "layer_types" in changes:  # transformers 5 renames those of its older models
        stored = json.loads((folder / "config.json").read_text())
        stored["layer_types"] = changes["layer_types"]
        (folder / "config.json").write_text(json.dumps(stored))
    reader = get_model_class(json.loads((folder / "config.json").read_text())["architectures"][0])
    reader.get_vocab_base = lambda _: (["a"] * N_TOKENS, [1] * N_TOKENS, "default")
    if name != "bert":  # whose vocabulary brings the count of token types
        reader.set_vocab = lambda _: None
    reader(folder, gguf.LlamaFileType.MOSTLY_F16, folder / "out.gguf").write()
    found = gguf.GGUFReader(folder / "out.gguf")
    left_out = ("GGUF.", "tokenizer.", "general.")
    return {
        "metadata": {
            key: [_kind(field), field.contents()]
            for key, field in found.fields.items()
            if not key.startswith(left_out)
        },
        "architecture": found.get_field("general.architecture").contents(),
        "tensors": {
            tensor.name: [tensor.tensor_type.name, *map(int, reversed(tensor.shape))]
            for tensor in found.tensors
        },
    }


def _kind(field: Any) -> str:
    """The type of a value, as `encode_value` wants it."""
    names = {"UINT32": "u32", "INT32": "i32", "FLOAT32": "f32", "BOOL": "bool", "STRING": "str"}
    first, *items = (kind.name for kind in field.types)
    return f"[{names[items[0]]}]" if items else names[first]


def main() -> None:
    """Make all of them."""
    headers = {}
    for name in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            headers[name] = convert(name, Path(folder))
    write_packed_json(HEADERS, headers)


if __name__ == "__main__":
    main()
