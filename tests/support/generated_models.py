"""Tiny hybrids and mixtures as Hugging Face directories. Their weights follow from names and a seed.

tests/data/generated_models.json.xz has config.json, names and shapes of each, and what transformers and
llama.cpp's converter make of it; `tools/make_generated_models.py` writes it.
"""

from __future__ import annotations

import functools
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support.fixtures import unpacked
from tests.support.packed_json import read_packed_json
from tests.support.places import TESTS

EXPECTED = TESTS / "data" / "generated_models.json.xz"
EXPECTED_TOO = (
    TESTS / "data" / "generated_models_too.json.xz"
)  # of `tools/more_generated_shapes.py`
ARCHITECTURES = unpacked("architectures")
WEIGHTS = "model.safetensors"
TOKENIZERS = {"gpt_oss": "phi4_mini", "llama4_text": "phi4_mini", "falcon_h1": "smollm3"}
TOKENIZERS |= dict.fromkeys(("gemma3n_text", "gemma4_text"), "gemma3")
TOKENIZERS |= dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), "qwen3")
QWEN35_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|"
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
Shapes = dict[str, list[int]]


@functools.cache
def all_facts() -> dict[str, Any]:
    """Return what is stored, by name of the model."""
    files = [path for path in (EXPECTED, EXPECTED_TOO) if path.is_file()]
    return {name: facts for path in files for name, facts in read_packed_json(path).items()}


GENERATED_CASES = [
    (name, variant) for name, facts in all_facts().items() for variant in facts["variants"]
]


def make_model(name: str, folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write one model of the list; keys of config.json may change, and `seed` gives other weights."""
    facts = all_facts()[name]
    return write_model(folder, facts["config"] | changes, facts["stored"], seed)


def write_model(folder: Path, config: dict[str, Any], shapes: Shapes, seed: int = 0) -> Path:
    """Write config.json, a tokenizer, and a BF16 tensor of each name and shape; U8 where MXFP4 is packed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, config["model_type"])
    write_tensors(folder / WEIGHTS, {name: draw(name, shapes[name], seed) for name in shapes})
    return folder


def write_tokenizer(folder: Path, model_type: str) -> None:
    """Write the tokenizer that tests/data/architectures has for a like family."""
    source = ARCHITECTURES / TOKENIZERS.get(model_type, "granite4")
    vocabulary = "tokenizer.model" if model_type == "gemma3n_text" else "tokenizer.json"
    for name in (vocabulary, "tokenizer_config.json", "chat_template.jinja"):
        if (source / name).is_file():
            (folder / name).write_bytes((source / name).read_bytes())
    if model_type.startswith("gemma4"):
        write_gemma4_tokenizer(folder)
    if model_type.startswith("qwen3_5"):
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = QWEN35_REGEX
        # Two bytes, of a letter and its mark, are one token where both are in one word.
        vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
        vocab["®à"] = vocab.pop("".join(merges.pop()))
        merges.append(["®", "à"])
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def write_gemma4_tokenizer(folder: Path) -> None:
    """Add merges to a SentencePiece's tokenizer.json, and the tokens that Gemma 4 shows or hides."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    for pair in (
        ("t", "h"),
        ("▁", "▁"),
        ("▁▁", "▁"),
        ("n", "d"),
        ("▁", "a"),
        ("▁a", "nd"),
        ("\n", "\n"),
    ):
        for token in (*pair, "".join(pair)):
            vocab.setdefault(token, len(vocab))
        merges.append(list(pair))
    for text, special in (
        ("<mask>", True),
        ("<|turn>", True),
        ("<turn|>", True),
        ("<|channel>", True),
        ("<b>", False),
        ("▁▁", False),
    ):
        vocab.setdefault(text, len(vocab))
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokenizer["added_tokens"].append(
            {"id": vocab[text], "content": text, "special": special, **plain}
        )
    tokenizer["post_processor"] = None
    config = {
        key: config[key] for key in ("bos_token", "eos_token", "unk_token", "tokenizer_class")
    }
    config["extra_special_tokens"] = {"sot_token": "<|turn>", "eot_token": "<turn|>"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "<pad>"}))


def draw(name: str, shape: list[int], seed: int) -> NDArray[Any]:
    """Draw a tensor: uint16 of BF16's bits, or the bytes of MXFP4."""
    rng = np.random.default_rng([zlib.crc32(name.encode()), seed])
    if name.endswith("_blocks"):
        return rng.integers(0, 256, shape, np.uint8)
    if name.endswith("_scales"):
        return rng.integers(121, 125, shape, np.uint8)  # powers of 2, of 127 less
    values = rng.integers(-127, 128, shape) / 128  # BF16 has them all
    if name.endswith(("norm.weight", "norm_1.weight", "norm_2.weight", ".D", "scale", "scalar")):
        values = 1 + values / 4
        if "post_feedforward" in name or "post_per_layer" in name:
            values = values / 256  # ggml looks Gemma's activation up in a table of halves
    elif name.endswith("A_log"):
        values = values + 1
    elif len(shape) > 1 and "embed" not in name and "conv1d" not in name and "bias" not in name:
        # A sum over a row stays near 1. Experts of Llama 4 and gpt-oss are stored with inputs first.
        n_in = shape[-2] if name.endswith("_proj") else shape[-1]
        values = values * 2.0 ** (1 - np.round(np.log2(n_in) / 2))
    return (values.astype("<f4").view("<u4") >> 16).astype("<u2")


def stored_f32(name: str) -> dict[str, NDArray[np.float32]]:
    """Draw the tensors of one model of the list that has no packed ones, as float32."""
    shapes = all_facts()[name]["stored"]
    return {
        tensor: (draw(tensor, shape, 0).astype("<u4") << 16).view("<f4").reshape(shape)
        for tensor, shape in shapes.items()
    }


def write_tensors(path: Path, tensors: dict[str, NDArray[Any]]) -> None:
    """Write a safetensors file: uint16 as BF16, uint8 as U8, float32 as F32."""
    header, at = {}, 0
    dtypes = {"uint16": "BF16", "uint8": "U8", "float32": "F32"}
    for name, x in tensors.items():
        dtype = dtypes[x.dtype.name]
        header[name] = {"dtype": dtype, "shape": x.shape, "data_offsets": [at, at + x.nbytes]}
        at += x.nbytes
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    data = b"".join(x.tobytes() for x in tensors.values())
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)
