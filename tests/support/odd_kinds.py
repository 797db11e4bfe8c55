"""Tiny random models that are no plain decoders: hybrids, mixtures of experts, the text part of a vision
model, an encoder. Names, shapes and settings are those of llama.cpp's converter (tools/make_odd_kinds.py).
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np

from edgemerge.formats.gguf.metadata import encode_value
from tests.support.open_gguf import OddModel, load_base
from tests.support.packed_json import read_packed_json
from tests.support.tiny_bert import write_tiny_bert
from tests.support.tiny_gguf import write_tiny_gguf

HEADERS = Path(__file__).resolve().parents[1] / "data" / "odd_kinds.json.xz"
N_TOKENS = 320


@functools.cache
def headers() -> dict[str, dict[str, Any]]:
    """By name of the kind: architecture, metadata with their types, and type and shape of each tensor."""
    found: dict[str, dict[str, Any]] = read_packed_json(HEADERS)
    return found


def write_kind(name: str, folder: Path) -> list[Path]:
    """Write a base and two experts of it in F32."""
    header = headers()[name]
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"general.architecture": encode_value(header["architecture"], "str")}
    for key, (kind, value) in header["metadata"].items():
        metadata[key] = encode_value(value, kind)
    metadata |= _tokenizer(name, folder)
    rng = np.random.default_rng(0)
    base = {t: _draw(t, tuple(shape), rng) for t, (_, *shape) in header["tensors"].items()}
    paths = []
    for who in ("base", "a", "b"):
        tensors = {}
        for tensor, values in base.items():
            if who != "base":
                noise = rng.standard_normal(values.shape, dtype=np.float32)
                values = values + np.float32(0.1) * values.std() * noise
            tensors[tensor] = (values.shape, "F32", values.tobytes())
        paths.append(OddModel(metadata, tensors).write(folder / f"{who}.gguf"))
    return paths


def _draw(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    values = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("ssm_a"):
        return -np.exp(values)  # a state that fades
    if len(shape) == 1 or "norm" in name or "ssm_conv1d" in name:
        centre = 0.0 if name.endswith("bias") else 1.0
        return np.float32(centre) + np.float32(0.1) * values
    return values * np.float32(1 / math.sqrt(shape[-1]))


def _tokenizer(name: str, folder: Path) -> dict[str, bytes]:
    """That of another tiny model, with as many tokens as the embedding has rows."""
    write = write_tiny_bert if name == "bert" else write_tiny_gguf
    model = load_base(write(folder / "tokenizer.gguf"))
    more = N_TOKENS - len(model.texts())
    for key, items, kind in (
        ("tokens", [*model.texts(), *(b"[PAD%d]" % i for i in range(more))], "[str]"),
        ("token_type", [*model.listed("tokenizer.ggml.token_type"), *[5] * more], "[i32]"),
        ("scores", [*model.listed("tokenizer.ggml.scores"), *[-1e4] * more], "[f32]"),
    ):
        if f"tokenizer.ggml.{key}" in model.metadata:
            model.set(f"tokenizer.ggml.{key}", items, kind)
    return {k: v for k, v in model.metadata.items() if k.startswith("tokenizer.")}
