"""A tiny random BERT as GGUF: an encoder, which embeds texts and writes none."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

N_EMBD, N_FF, N_HEADS, CONTEXT = 32, 64, 2, 64
WORDS = [f"▁{letter}" for letter in "abcdefghijklmnopqrstuvwxyz.,!?0123456789"]
WORDS += [letter for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
TEXTS = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]


def write_tiny_bert(path: Path, *, seed: int = 0, ranks: bool = False) -> Path:
    """Write the model (float32 weights drawn from `seed`) and return its path.

    With `ranks` it orders texts.
    """
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_block_count(1)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEADS)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.RANK if ranks else gguf.PoolingType.MEAN)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("bert")
    writer.add_token_type_count(2)
    writer.add_token_list(TEXTS)
    writer.add_token_types([1 if text in WORDS else 3 for text in TEXTS])
    writer.add_bos_token_id(101)
    writer.add_sep_token_id(102)
    rng = np.random.default_rng(seed)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, rng.standard_normal(shape, dtype=np.float32) * np.float32(0.3))

    def linear(name: str, rows: int, cols: int) -> None:
        add(f"{name}.weight", rows, cols)
        add(f"{name}.bias", rows)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(N_EMBD, dtype=np.float32))
        add(f"{name}.bias", N_EMBD)

    add("token_embd.weight", len(TEXTS), N_EMBD)
    add("position_embd.weight", CONTEXT, N_EMBD)
    add("token_types.weight", 2, N_EMBD)
    norm("token_embd_norm")
    for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
        linear(f"blk.0.{part}", N_EMBD, N_EMBD)
    norm("blk.0.attn_output_norm")
    linear("blk.0.ffn_up", N_FF, N_EMBD)
    linear("blk.0.ffn_down", N_EMBD, N_FF)
    norm("blk.0.layer_output_norm")
    if ranks:
        linear("cls", N_EMBD, N_EMBD)
        linear("cls.output", 1, N_EMBD)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
