"""Tiny Hugging Face directories of families whose weights are drawn here, and not stored.

`tools/make_drawn_families.py` asks transformers and llama.cpp's converter what they come to, and
tests/data/drawn_families.json.xz keeps it: of each family config.json, the names and shapes of its
tensors, and the right values.
"""

from __future__ import annotations

import functools
import json
import lzma
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.fixtures import unpacked
from tests.support.places import TESTS
from tests.support.safetensors_files import Float32

EXPECTED = TESTS / "data" / "drawn_families.json.xz"
ARCHITECTURES = unpacked("architectures")
WEIGHTS = "model.safetensors"
QWEN35_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|"
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Marks beside letters, which not all families keep together.
TEXT = "Ça coûte 3.14 + 10000 €, naïve?  🦙\n\tdef f(x):\n\n    return x[1:] != 'it''s'  # नमस्ते"


@functools.cache
def all_facts() -> dict[str, Any]:
    """Return what is stored, by name of the model."""
    known: dict[str, Any] = json.loads(lzma.decompress(EXPECTED.read_bytes()))
    return known


def make_directory(name: str, folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write one model; keys of config.json change by name, and `seed` draws other weights."""
    entry = all_facts()[name]
    return write_model(folder, entry["config"] | changes, entry["stored"], seed)


def write_model(
    folder: Path, config: dict[str, Any], shapes: dict[str, list[int]], seed: int = 0
) -> Path:
    """Write config.json, a tokenizer and weights of these names and shapes, as BF16."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    model_type = config.get("text_config", config)["model_type"]
    write_tokenizer(folder, model_type)
    tensors = {name: draw(name, tuple(shape), model_type, seed) for name, shape in shapes.items()}
    write_bf16(folder / WEIGHTS, tensors)
    return folder


def draw(name: str, shape: tuple[int, ...], model_type: str, seed: int) -> Float32:
    """Draw a tensor of values that BF16 has, from its name and a seed."""
    rng = np.random.default_rng([zlib.crc32(name.encode()), seed])
    if len(shape) == 1:
        is_offset = model_type.startswith("qwen3_") and not name.endswith("linear_attn.norm.weight")
        centre = 0.0 if is_offset or not name.endswith("norm.weight") else 1.0
        return (centre + rng.integers(-31, 32, shape) / 128).astype(np.float32)
    # Uniform, and as wide as keeps a sum over one row near 1.
    n_in = shape[-1] if "conv1d" not in name else 1
    scale = 2.0 ** -np.round(np.log2(n_in) / 2) if "embed" not in name else 1.0
    return (rng.integers(-127, 128, shape) / 64 * scale).astype(np.float32)


def write_bf16(path: Path, tensors: dict[str, Float32]) -> None:
    """Write a safetensors file; the values are cut to BF16."""
    header, at = {}, 0
    for name, x in sorted(tensors.items()):
        header[name] = {"dtype": "BF16", "shape": x.shape, "data_offsets": [at, at + 2 * x.size]}
        at += 2 * x.size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    data = [(x.view("<u4") >> 16).astype("<u2").tobytes() for _, x in sorted(tensors.items())]
    path.write_bytes(len(head).to_bytes(8, "little") + head + b"".join(data))


def write_tokenizer(folder: Path, model_type: str) -> None:
    """Write the tokenizer that tests/data/architectures has for a like family."""
    source = ARCHITECTURES / "qwen3"
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    if model_type.startswith("qwen3_5"):
        tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = QWEN35_REGEX
        # Two bytes, of a letter and its mark, are one token where both are in one word.
        vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
        vocab["®à"] = vocab.pop("".join(merges.pop()))
        merges.append(["®", "à"])
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((source / name).read_bytes())
