"""PEFT adapters of every kind, for the tiny models of tests/data/architectures. Needs NumPy and safetensors.

Values follow from whole numbers alone, so that they are the same with every version of NumPy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

Float32 = NDArray[np.float32]

FRONT = "base_model.model."
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Kind:
    """One adapter: of which tiny model, what adapter_config.json says, and its tensors' shapes."""

    base: str
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    dtype: type[np.generic] = np.float32
    expected: str | None = None  # kind whose answers are right for it too
    scale: dict[str, float] = field(default_factory=dict)  # part of a name -> size of its values


def noise(shape: tuple[int, ...], seed: int) -> Float32:
    """Numbers from -0.5 to 0.5, by splitmix64."""
    n = int(np.prod(shape))
    x = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x += np.uint64(seed * 0xD1B54A32D192ED03 % (1 << 64))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return ((x >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24) - 0.5).reshape(shape)


def project(tensor: NDArray[np.generic]) -> float:
    """Return one number that changes with every element and every order of them."""
    flat = np.asarray(tensor, np.float64).reshape(-1)
    return float(flat @ np.cos(np.arange(flat.size) * 1.7 + 0.3))


def write_adapter(kind: Kind, folder: Path) -> Path:
    """Write the directory as PEFT does."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = {"peft_type": "LORA", "base_model_name_or_path": kind.base}
    config |= {"task_type": "CAUSAL_LM"}
    config |= {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "bias": "none"} | kind.config
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {name: values.astype(kind.dtype) for name, values in tensors_of(kind).items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def tensors_of(kind: Kind) -> dict[str, Float32]:
    """Make the adapter's tensors: by name, float32, exact in float16."""
    found = {}
    for seed, (name, shape) in enumerate(kind.shapes.items()):
        size = next((s for part, s in kind.scale.items() if part in name), 0.5)
        found[name] = (noise(shape, seed + 1) * size).astype(np.float16).astype(np.float32)
        if "magnitude" in name:
            found[name] = np.abs(found[name]) + np.float32(0.25)
    return found


def pair(module: str, out: int, inner: int, rank: int = 4) -> dict[str, tuple[int, ...]]:
    """A and B of a linear module."""
    name = f"{FRONT}{module}"
    return {f"{name}.lora_A.weight": (rank, inner), f"{name}.lora_B.weight": (out, rank)}


def layers(ranks: Mapping[str, int] | None = None, n_layers: int = 2) -> dict[str, tuple[int, ...]]:
    """All linear modules of the tiny Llama and the tiny Qwen2."""
    sizes = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)}
    sizes |= {"gate_proj": (48, 32), "up_proj": (48, 32), "down_proj": (32, 48)}
    found: dict[str, tuple[int, ...]] = {}
    for layer in range(n_layers):
        for name, (out, inner) in sizes.items():
            part = "mlp" if name in LINEAR[4:] else "self_attn"
            module = f"model.layers.{layer}.{part}.{name}"
            rank = next((r for end, r in (ranks or {}).items() if module.endswith(end)), 4)
            found |= pair(module, out, inner, rank)
    return found


def _dora(n_layers: int = 2) -> dict[str, tuple[int, ...]]:
    found = layers(n_layers=n_layers)
    for name, shape in list(found.items()):
        if "lora_B" in name:
            found[name.replace("lora_B.weight", "lora_magnitude_vector")] = shape[:1]
    return found


def _embedding(rows: int = 336, width: int = 32) -> dict[str, tuple[int, ...]]:
    name = f"{FRONT}model.embed_tokens.lora_embedding_"
    return {f"{name}A": (4, rows), f"{name}B": (width, 4)}


def _biases() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for module in ("q_proj", "k_proj", "v_proj"):
        out = 32 if module == "q_proj" else 16
        name = f"model.layers.1.self_attn.{module}"
        found |= pair(name, out, 32) | {f"{FRONT}{name}.lora_B.bias": (out,)}
    return found


def _experts(layer: int, swapped: bool = False) -> dict[str, tuple[int, ...]]:
    """Experts of the tiny Qwen3-MoE, four of (24, 32) for gate and up, as one parameter each."""
    name = f"{FRONT}model.layers.{layer}.mlp.experts"
    sizes = {f"{name}.base_layer": (48, 32), name: (32, 24)}
    found: dict[str, tuple[int, ...]] = {}
    for module, (out, inner) in sizes.items():
        out, inner = (inner, out) if swapped else (out, inner)
        found |= {f"{module}.lora_A.weight": (12, inner), f"{module}.lora_B.weight": (out, 12)}
    return found


def _renamed(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """As a tool saves them that keeps the adapter's name and FSDP's modules."""
    renamed = {}
    for name, shape in shapes.items():
        name = name.replace(".weight", ".default.weight")
        renamed[name.replace("model.layers.", "_fsdp_wrapped_module.model.layers.")] = shape
    return renamed


ALL = {"target_modules": list(LINEAR)}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
_SAVED = {
    f"{FRONT}model.layers.0.self_attn.q_proj.weight": (32, 32),
    f"{FRONT}model.norm.weight": (32,),
    f"{FRONT}model.layers.1.input_layernorm.weight": (32,),
}
_PHI = pair("model.layers.0.self_attn.qkv_proj", 64, 32) | pair(
    "model.layers.1.mlp.gate_up_proj", 96, 32
)
_HEAD = {f"{FRONT}lm_head.weight": (384, 32), f"{FRONT}model.embed_tokens.weight": (384, 32)}
_TOKENS = f"{FRONT}model.embed_tokens.token_adapter.trainable_tokens_delta"

KINDS: dict[str, Kind] = {
    "lora": Kind("llama", ALL, layers()),
    "lora of halves": Kind("llama", ALL, layers(), np.float16, expected="lora"),
    "saved with names of FSDP": Kind("llama", ALL, _renamed(layers()), expected="lora"),
    "rslora": Kind("llama", ALL | {"use_rslora": True}, layers()),
    "patterns": Kind(
        "qwen2",
        ALL
        | {
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 8},
            "alpha_pattern": {"down_proj": 1, r"layers.0.self_attn.q_proj": 12},
        },
        layers({"q_proj": 2, "1.mlp.up_proj": 8}),
    ),
    "dora": Kind("llama", ALL | {"use_dora": True}, _dora()),
    "modules_to_save": Kind(
        "llama",
        {"modules_to_save": ["model.norm", "input_layernorm"], "target_modules": ["v_proj"]},
        pair("model.layers.0.self_attn.v_proj", 16, 32)
        | {f"{FRONT}model.norm.weight": (32,)}
        | {f"{FRONT}model.layers.{i}.input_layernorm.weight": (32,) for i in range(2)},
    ),
    "head and embedding saved": Kind(
        "phi3",
        {"modules_to_save": ["lm_head", "embed_tokens"]} | {"target_modules": ["qkv_proj"]},
        pair("model.layers.0.self_attn.qkv_proj", 64, 32) | _HEAD,
    ),
    "norms of gemma saved": Kind(
        "gemma3",
        {"modules_to_save": ["model.norm"], "target_modules": ["q_proj"]},
        pair("model.layers.3.self_attn.q_proj", 32, 24) | {f"{FRONT}model.norm.weight": (24,)},
    ),
    "embedding": Kind("qwen2", {"target_modules": ["embed_tokens"]}, _embedding()),
    "tokens": Kind(
        "qwen2",
        {"target_modules": ["v_proj"], "trainable_token_indices": [7, 335, 0]},
        pair("model.layers.0.self_attn.v_proj", 16, 32) | {_TOKENS: (3, 32)},
    ),
    "bias": Kind(
        "llama",
        {"bias": "lora_only", "target_modules": ["q_proj", "o_proj"]},
        pair("model.layers.0.self_attn.q_proj", 32, 32)
        | {f"{FRONT}model.layers.0.self_attn.q_proj.base_layer.bias": (32,)},
    ),
    "lora_bias": Kind(
        "qwen2", {"lora_bias": True, "target_modules": ["q_proj", "k_proj", "v_proj"]}, _biases()
    ),
    "fused": Kind("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}, _PHI),
    "halves": Kind(
        "granite4",
        {"target_modules": ["input_linear", "output_linear", "k_proj"]},
        pair("model.layers.1.shared_mlp.input_linear", 48, 16)
        | pair("model.layers.0.shared_mlp.output_linear", 16, 24)
        | pair("model.layers.0.self_attn.k_proj", 8, 16),
    ),
    "experts": Kind(
        "qwen3_moe",
        {"r": 3, "target_modules": [], "target_parameters": EXPERTS},
        _experts(0) | _experts(1),
    ),
    "router": Kind(
        "qwen3_moe",
        {"target_modules": ["k_proj"]},
        pair("model.layers.0.self_attn.k_proj", 32, 32),
    ),
}

COMBINED = {"lora": 0.7, "rslora": -0.4}  # kinds that are combined, and their weights
DENSITY = 0.6
EXACT = ("cat", "linear", "ties", "magnitude_prune", "svd", "ties_svd", "magnitude_prune_svd")
SHOWN = ("0.self_attn.q_proj.weight", "1.mlp.down_proj.weight")
