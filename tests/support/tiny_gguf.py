"""A tiny random Llama as GGUF, with a vocabulary that spells anything, to test the runtime.

Run `python -m tests.support.tiny_gguf OUT.gguf` to have one at hand.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np

LETTERS = "▁abcdefghijklmnopqrstuvwxyz.,!?"
WORDS = ("▁the", "▁of", "▁answer", "er", "in", "on")
CONTEXT = 256
N_EMBD, N_FF, N_LAYERS, N_HEADS, N_KV_HEADS = 64, 128, 2, 4, 2


def write_tiny_gguf(path: Path, *, seed: int = 0) -> Path:
    """Write the model (float32 weights drawn from `seed`) and return its path."""
    kinds = gguf.TokenType
    vocabulary = [("<unk>", 0.0, kinds.UNKNOWN)]
    vocabulary += [("<s>", 0.0, kinds.CONTROL), ("</s>", 0.0, kinds.CONTROL)]
    vocabulary += [(f"<0x{byte:02X}>", 0.0, kinds.BYTE) for byte in range(256)]
    vocabulary += [
        (piece, -float(rank), kinds.NORMAL) for rank, piece in enumerate((*WORDS, *LETTERS))
    ]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(N_LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(N_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(N_EMBD // N_HEADS)
    writer.add_vocab_size(len(vocabulary))
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece.encode() for piece, _, _ in vocabulary])
    writer.add_token_scores([score for _, score, _ in vocabulary])
    writer.add_token_types([kind for _, _, kind in vocabulary])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)

    rng = np.random.default_rng(seed)

    def matrix(name: str, rows: int, cols: int) -> None:
        values = rng.standard_normal((rows, cols), dtype=np.float32) * np.float32(0.3)
        writer.add_tensor(f"{name}.weight", values)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(N_EMBD, dtype=np.float32))

    n_kv = N_EMBD // N_HEADS * N_KV_HEADS
    matrix("token_embd", len(vocabulary), N_EMBD)
    norm("output_norm")
    matrix("output", len(vocabulary), N_EMBD)
    for layer in range(N_LAYERS):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm")
        norm(f"{block}.ffn_norm")
        matrix(f"{block}.attn_q", N_EMBD, N_EMBD)
        matrix(f"{block}.attn_k", n_kv, N_EMBD)
        matrix(f"{block}.attn_v", n_kv, N_EMBD)
        matrix(f"{block}.attn_output", N_EMBD, N_EMBD)
        matrix(f"{block}.ffn_gate", N_FF, N_EMBD)
        matrix(f"{block}.ffn_up", N_FF, N_EMBD)
        matrix(f"{block}.ffn_down", N_EMBD, N_FF)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


if __name__ == "__main__":
    write_tiny_gguf(Path(sys.argv[1]))
