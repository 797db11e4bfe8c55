#!/usr/bin/env python3
"""Make a Hugging Face model directory with seeded random weights, of a real model's shape.

    tools/make_tiny_model.py --shape tinyllama --out base
    tools/make_tiny_model.py --noise-of base --std 0.005 --seed 1 --out expert

Merging such models takes the time and memory of the real ones; what they say means nothing. The
weights are a function of (seed, tensor, element) alone, and at no time is more than a few blocks of
them in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.support.fixtures import unpacked

BLOCK = 1 << 22  # elements drawn at a time by one thread: 16 MiB of float32
INIT_STD = 0.02  # Llama's initializer_range
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
WEIGHTS, NOISE = 0, 1  # streams: noise never repeats the weights of its base, whatever the seeds
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

# fmt: off
SHAPES: dict[str, dict[str, int | float | bool | str]] = {
    "zoo": dict(
        hidden_size=256, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        intermediate_size=512, vocab_size=4096, max_position_embeddings=256,
        rope_theta=10000.0, tie_word_embeddings=True, model_type="llama"),
    "smollm2-135m": dict(
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536, vocab_size=49152, max_position_embeddings=8192,
        rope_theta=100000.0, tie_word_embeddings=True, model_type="llama"),
    "llama-160m": dict(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=12,
        intermediate_size=3072, vocab_size=32000, max_position_embeddings=2048,
        rope_theta=10000.0, tie_word_embeddings=False, model_type="llama"),
    "tinyllama": dict(
        hidden_size=2048, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
        intermediate_size=5632, vocab_size=32000, max_position_embeddings=2048,
        rope_theta=10000.0, tie_word_embeddings=False, model_type="llama"),
    "mistral-7b": dict(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        intermediate_size=14336, vocab_size=32000, max_position_embeddings=32768,
        rope_theta=10000.0, tie_word_embeddings=False, model_type="mistral"),
}
# fmt: on


@dataclass(frozen=True)
class Tensor:
    """Where the data of one tensor lies in a safetensors file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    offset: int

    @property
    def n_elements(self) -> int:
        return prod(self.shape)


def make_config(shape: str, dtype: str) -> dict[str, object]:
    """Make the config.json of a shape."""
    facts = SHAPES[shape]
    kind = str(facts["model_type"])
    return {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        **facts,
        "head_dim": int(facts["hidden_size"]) // int(facts["num_attention_heads"]),
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": TORCH_NAMES[dtype],
    }


def tensor_shapes(config: dict[str, object]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor, in the order of the layers."""

    def size(key: str) -> int:
        return int(str(config[key]))

    hidden, feed_forward, vocab = size("hidden_size"), size("intermediate_size"), size("vocab_size")
    q_rows = size("num_attention_heads") * size("head_dim")
    kv_rows = size("num_key_value_heads") * size("head_dim")
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(size("num_hidden_layers")):
        block = f"model.layers.{layer}"
        yield f"{block}.input_layernorm.weight", (hidden,)
        yield f"{block}.self_attn.q_proj.weight", (q_rows, hidden)
        yield f"{block}.self_attn.k_proj.weight", (kv_rows, hidden)
        yield f"{block}.self_attn.v_proj.weight", (kv_rows, hidden)
        yield f"{block}.self_attn.o_proj.weight", (hidden, q_rows)
        yield f"{block}.post_attention_layernorm.weight", (hidden,)
        yield f"{block}.mlp.gate_proj.weight", (feed_forward, hidden)
        yield f"{block}.mlp.up_proj.weight", (feed_forward, hidden)
        yield f"{block}.mlp.down_proj.weight", (hidden, feed_forward)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, hidden)


def lay_out(
    shapes: list[tuple[str, tuple[int, ...]]],
    dtype: str,
    shard_bytes: int,
    folder: Path,
    *,
    allocate: Callable[[int, int, int], None] = os.posix_fallocate,
) -> list[Tensor]:
    """Write the headers of all shards, allocate their data, and say where each tensor goes."""
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    used = 0
    for name, shape in shapes:
        size = prod(shape) * ITEM_BYTES[dtype]
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append((name, shape))
        used += size
    tensors: list[Tensor] = []
    for number, shard in enumerate(shards, start=1):
        single = len(shards) == 1
        suffix = "" if single else f"-{number:05d}-of-{len(shards):05d}"
        file = folder / f"model{suffix}.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shard:
            begin, end = end, end + prod(shape) * ITEM_BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with file.open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.flush()
            allocate(out.fileno(), 0, 8 + len(text) + end)
        tensors += read_header(file)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(prod(s) for _, s in shapes) * ITEM_BYTES[dtype]},
            "weight_map": {tensor.name: tensor.file.name for tensor in tensors},
        }
        write_json(folder / "model.safetensors.index.json", index)
    return tensors


def read_header(file: Path) -> list[Tensor]:
    """Where the tensors of one safetensors file lie."""
    with file.open("rb") as source:
        (length,) = struct.unpack("<Q", source.read(8))
        header = json.loads(source.read(length))
    header.pop("__metadata__", None)
    return [
        Tensor(name, tuple(at["shape"]), at["dtype"], file, 8 + length + at["data_offsets"][0])
        for name, at in header.items()
    ]


def encode(x_f32: np.ndarray, dtype: str) -> np.ndarray:
    """Round float32 to the stored type; bf16 as the upper half of the bits, to nearest even."""
    if dtype == "F32":
        return x_f32
    if dtype == "F16":
        return x_f32.astype(np.float16)
    bits = x_f32.view(np.uint32)
    bits += ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    return (bits >> np.uint32(16)).astype(np.uint16)


def decode(raw: bytes, dtype: str) -> np.ndarray:
    """Read stored values as float32."""
    if dtype == "F32":
        return np.frombuffer(raw, dtype=np.float32)
    if dtype == "F16":
        return np.frombuffer(raw, dtype=np.float16).astype(np.float32)
    return (np.frombuffer(raw, dtype=np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def draw(name: str, block: int, count: int, seed: int, stream: int) -> np.ndarray:
    """Draw standard normal values, a function of (seed, stream, tensor, block)."""
    rng = np.random.default_rng([seed, stream, zlib.crc32(name.encode()), block])
    return rng.standard_normal(count, dtype=np.float32)


def fill(tensors: list[Tensor], values: Callable[[Tensor, int, int], np.ndarray]) -> None:
    """Compute and write all tensors, block by block, on every core.

    Parameters
    ----------
    tensors : list of Tensor
        Where to write.
    values : (tensor, block, count) -> (count,) float32
        What to write; the array is overwritten.
    """
    files = {file: os.open(file, os.O_WRONLY) for file in {tensor.file for tensor in tensors}}

    def work(job: tuple[Tensor, int]) -> None:
        tensor, block = job
        count = min(BLOCK, tensor.n_elements - block * BLOCK)
        data = encode(values(tensor, block, count), tensor.dtype).data.cast("B")
        offset = tensor.offset + block * BLOCK * ITEM_BYTES[tensor.dtype]
        while data:  # a write may be short
            written = os.pwrite(files[tensor.file], data, offset)
            data, offset = data[written:], offset + written

    jobs = [(t, block) for t in tensors for block in range(-(-t.n_elements // BLOCK))]
    try:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for _ in pool.map(work, jobs):
                pass  # so that an error in a thread is raised here
    finally:
        for descriptor in files.values():
            os.close(descriptor)


def random_values(seed: int) -> Callable[[Tensor, int, int], np.ndarray]:
    """Weights of a fresh model: N(0, 0.02), norms around 1."""

    def values(tensor: Tensor, block: int, count: int) -> np.ndarray:
        x = draw(tensor.name, block, count, seed, WEIGHTS)
        x *= np.float32(INIT_STD)
        if len(tensor.shape) == 1:
            x += np.float32(1.0)
        return x

    return values


def noisy_values(
    original: dict[str, Tensor], std: float, seed: int
) -> Callable[[Tensor, int, int], np.ndarray]:
    """Weights of another model plus noise."""
    files = {file: file.open("rb") for file in {tensor.file for tensor in original.values()}}

    def values(tensor: Tensor, block: int, count: int) -> np.ndarray:
        x = draw(tensor.name, block, count, seed, NOISE)
        x *= np.float32(std)
        source = original[tensor.name]
        item = ITEM_BYTES[source.dtype]
        offset = source.offset + block * BLOCK * item
        x += decode(os.pread(files[source.file].fileno(), count * item, offset), source.dtype)
        return x

    return values


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write the tokenizer of tests/models/base, filled up with words that no text has."""

    def varint(value: int) -> bytes:
        out = b""
        while value > 0x7F:
            out += bytes([value & 0x7F | 0x80])
            value >>= 7
        return out + bytes([value])

    stored = unpacked("models") / "base"
    model = (stored / "tokenizer.model").read_bytes()
    n_pieces = json.loads((stored / "config.json").read_text())["vocab_size"]
    # Protocol buffers concatenate: repeated fields (ModelProto.pieces = 1) are appended, single
    # ones (ModelProto.trainer_spec = 2, in it vocab_size = 4) replaced.
    extra = []
    for number in range(n_pieces, vocab_size):
        word = f"<extra-{number}>".encode()
        piece = b"\x0a" + varint(len(word)) + word + b"\x15" + struct.pack("<f", -float(number))
        extra.append(b"\x0a" + varint(len(piece)) + piece)
    size = b"\x20" + varint(vocab_size)
    (folder / "tokenizer.model").write_bytes(
        model + b"".join(extra) + b"\x12" + varint(len(size)) + size
    )
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_bytes((stored / name).read_bytes())


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--shape", choices=SHAPES, help="a fresh model of this shape")
    what.add_argument("--noise-of", type=Path, metavar="DIR", help="another model, plus noise")
    parser.add_argument("--std", type=float, default=0.005, help="of the noise (%(default)s)")
    parser.add_argument(
        "--dtype", choices=[name.lower() for name in ITEM_BYTES], help="bf16, or as --noise-of has"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-mb", type=int, default=2000, help="size of a shard (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.out.exists():
        print(f"{args.out} is there already: remove it or choose another --out", file=sys.stderr)
        return 1
    dtype = args.dtype.upper() if args.dtype else "BF16"
    if args.noise_of:
        config = json.loads((args.noise_of / "config.json").read_text(encoding="utf-8"))
        files = sorted(args.noise_of.glob("*.safetensors"))
        original = {tensor.name: tensor for file in files for tensor in read_header(file)}
        if not args.dtype:
            dtype = next(iter(original.values())).dtype
        config["torch_dtype"] = TORCH_NAMES[dtype]
        shapes = [(tensor.name, tensor.shape) for tensor in original.values()]
        values = noisy_values(original, args.std, args.seed)
    else:
        config = make_config(args.shape, dtype)
        shapes = list(tensor_shapes(config))
        values = random_values(args.seed)
    args.out.mkdir(parents=True)
    write_json(args.out / "config.json", config)
    write_tokenizer(args.out, config["vocab_size"])
    fill(lay_out(shapes, dtype, args.shard_mb * 10**6, args.out), values)
    return 0


if __name__ == "__main__":
    sys.exit(main())
