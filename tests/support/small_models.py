"""Small Llamas on disk for tests of whole merges, and their tensors read back by gguf-py."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

Float32 = NDArray[np.float32]

N_HEADS, N_KV_HEADS = 4, 2  # of the golden models

ROLES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GLOBALS = {
    "lm_head.weight": "output.weight",
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
}


def gguf_name(name: str) -> str:
    """Hugging Face's name of a Llama tensor -> GGUF's."""
    if name in GLOBALS:
        return GLOBALS[name]
    layer, role = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name).groups()  # type: ignore[union-attr]
    return f"blk.{layer}.{ROLES[role]}.weight"


def to_gguf_rows(name: str, tensor: NDArray[np.generic]) -> NDArray[np.generic]:
    """Rows of q and k in GGUF's rotary order; any other tensor as it is."""
    role = name.split(".")[-2]
    if role not in ("q_proj", "k_proj"):
        return tensor
    heads = N_HEADS if role == "q_proj" else N_KV_HEADS
    rows, cols = tensor.shape
    halves = tensor.reshape(heads, 2, rows // heads // 2, cols)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, cols)


def load_hub(path: Path) -> dict[str, NDArray[np.generic]]:
    """Tensors of a safetensors file, by GGUF name and in GGUF's order of rows."""
    return {gguf_name(n): to_gguf_rows(n, t) for n, t in load_file(path).items()}


def load_gguf(path: Path) -> dict[str, Float32]:
    """Tensors of a GGUF, dequantised by gguf-py."""
    return {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
        .astype(np.float32)
        .reshape(tuple(int(n) for n in tensor.shape)[::-1])
        for tensor in gguf.GGUFReader(path).tensors
    }


def stored(path: Path) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of every tensor of a GGUF."""
    tensors = gguf.GGUFReader(path).tensors
    return {tensor.name: (tensor.tensor_type.name, tensor.data.tobytes()) for tensor in tensors}


def block_count(path: Path) -> int:
    return int(gguf.GGUFReader(path).fields["llama.block_count"].contents())


def edit_hub(
    source: Path, target: Path, edit: Callable[[str, Float32], NDArray[np.generic]]
) -> Path:
    """Copy a Hugging Face directory with every tensor passed through `edit(name, tensor)`."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    edited = {name: np.ascontiguousarray(edit(name, tensor)) for name, tensor in tensors.items()}
    save_file(edited, target / "model.safetensors", metadata={"format": "pt"})
    return target


def deepen_hub(source: Path, target: Path, n_layers: int) -> Path:
    """Copy a Hugging Face directory with more layers, each like the one two before it."""
    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "num_hidden_layers": n_layers}))
    tensors = load_file(source / "model.safetensors")
    for layer in range(config["num_hidden_layers"], n_layers):
        for name in [n for n in tensors if n.startswith(f"model.layers.{layer - 2}.")]:
            tensors[name.replace(f".{layer - 2}.", f".{layer}.")] = tensors[name]
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def write_gguf(
    path: Path, tensors: Mapping[str, Float32], *, n_layers: int = 1, tokens: Sequence[str] = ()
) -> Path:
    """Write float32 tensors as a GGUF that merges; no whole tokenizer, so that nothing runs it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(n_layers)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(N_KV_HEADS)
    if tokens:
        writer.add_token_list(list(tokens))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


WIDE = {"token_embd": 40, "output_norm": 0, "output": 40}  # rows of 256; 0: a vector
WIDE |= {"blk.0.attn_norm": 0, "blk.0.attn_q": 48, "blk.0.attn_k": 16, "blk.0.attn_v": 17}
WIDE |= {"blk.0.attn_output": 33, "blk.0.ffn_norm": 0, "blk.0.ffn_gate": 21, "blk.0.ffn_down": 64}


def wide_tensors(seed: int, near: Mapping[str, Float32] | None = None) -> dict[str, Float32]:
    """One layer with the rows of 256 that k-quants need; `near` another as a fine-tune is."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, Float32] = {}
    for stem, rows in WIDE.items():
        noise = rng.standard_normal((rows, 256) if rows else 256).astype(np.float32)
        name = f"{stem}.weight"
        tensors[name] = noise if near is None else near[name] + np.float32(0.1) * noise**3
    return tensors
