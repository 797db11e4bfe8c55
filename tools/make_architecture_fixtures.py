#!/usr/bin/env python3
"""Make tests/data/architectures: tiny random models, what transformers computes with them, and
what llama.cpp's converter writes.

    python tools/make_architecture_fixtures.py LLAMA_CPP_SOURCE [NAME ...]

Needs torch, transformers, sentencepiece and gguf, which edgemerge does not; the versions used are
kept in tests/data/architectures/README.md. Weights follow from the seed, so a second run gives the
same files with the same versions.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch  # noqa: TID251
from safetensors.numpy import save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: TID251

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.support.fixtures import unpacked
from tools.architecture_shapes import PRE_TOKENIZERS, SHAPES, Shape
from tools.pack_fixtures import pack

ROOT = Path(__file__).resolve().parents[1]
CORPUS = ROOT / "LICENSE"
N_TOKENS, SHOWN = 28, (13, 27)  # length of the sequence, positions whose logits are kept
TEXT = "Ça coûte 3.14 + 10000 €, naïve?  🦙🚀\n\tdef f(x):\n    return x[1:] != 'it''s'  # façade"
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% endfor %}"


def make(folder: Path, name: str, shape: Shape, llama_cpp: Path) -> None:
    """Write one fixture."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make_tokenizer(folder, shape)
    make_model(folder, shape)
    variants: dict[str, Any] = {"": {}} | shape.variants
    logits, expected = {}, {}
    for variant, changes in variants.items():
        with tempfile.TemporaryDirectory() as scratch:
            copy = shutil.copytree(folder, Path(scratch) / name)
            change_config(copy, changes)
            logits[variant or "plain"] = compute_logits(copy)
            converted = convert(copy, shape.pre, llama_cpp, "f32")
            if not variant:
                types = convert(copy, shape.pre, llama_cpp, "f16")["tensors"]
                for tensor, (_, _, dtype) in types.items():
                    converted["tensors"][tensor].append(dtype)
            else:  # the weights are the same
                kept = (
                    "rope_freqs.weight",
                    "rope_factors_long.weight",
                    "rope_factors_short.weight",
                )
                found = converted["tensors"].items()
                converted["tensors"] = {t: entry for t, entry in found if t in kept}
                own = converted["metadata"].items()
                away = ("general.", "tokenizer.")
                converted["metadata"] = {k: v for k, v in own if not k.startswith(away)}
            expected[variant or "plain"] = {"config": changes, **converted}
    arrays: dict[str, Any] = logits
    np.savez_compressed(folder / "logits.npz", **arrays)
    facts = {
        "tokens": token_sequence(shape.config["vocab_size"]),
        "shown": SHOWN,
        "text": TEXT,
        "text_ids": encode(folder, shape),
        "converter": expected,
    }
    (folder / "expected.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


def change_config(folder: Path, changes: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def token_sequence(n_vocab: int) -> list[int]:
    """Tokens from all over the vocabulary."""
    return [(37 * i + 11) % (n_vocab - 3) for i in range(N_TOKENS)]


# -- the model -------------------------------------------------------------------------------------


def make_model(folder: Path, shape: Shape) -> None:
    config = AutoConfig.for_model(shape.model_type, **shape.config)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    dtype = DTYPES[shape.dtype]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            gemma = "gemma" in shape.model_type
            if weight.dim() == 1:
                # Gemma stores its norms less 1. ggml looks its activation up in a table of halves: let
                # it weigh little.
                centre, spread = (0.0 if name.endswith("bias") or gemma else 1.0), 0.2
                if gemma and "post_feedforward" in name:
                    centre, spread = -0.9, 0.05
                weight.copy_((centre + spread * torch.randn(weight.shape)).to(dtype))
            else:
                embedding = 0.1 if gemma else 1.0
                scale = embedding if "embed" in name else weight.shape[-1] ** -0.5
                weight.copy_((scale * torch.randn(weight.shape)).to(dtype))
    model.to(dtype).save_pretrained(folder)
    generation = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    if shape.config_removed or shape.config_added:
        config = json.loads((folder / "config.json").read_text()) | shape.config_added
        config = {k: v for k, v in config.items() if k not in shape.config_removed}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def compute_logits(folder: Path) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    tokens = token_sequence(model.config.vocab_size)
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return logits[list(SHOWN)].numpy()


# -- the tokenizer ---------------------------------------------------------------------------------


def make_tokenizer(folder: Path, shape: Shape) -> None:
    if shape.pre is None:
        make_sentencepiece(folder, shape)
    else:
        make_bpe(folder, shape)


def make_sentencepiece(folder: Path, shape: Shape) -> None:
    gemma = "gemma" in shape.model_type
    SentencePieceTrainer.train(
        input=str(CORPUS),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=shape.n_tokens,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=not gemma,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        pad_id=0 if gemma else -1,
        eos_id=1 if gemma else 2,
        bos_id=2 if gemma else 1,
        unk_id=3 if gemma else 0,
        pad_piece="<pad>",
        bos_piece="<bos>" if gemma else "<s>",
        eos_piece="<eos>" if gemma else "</s>",
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    added = {
        str(shape.n_tokens + i): {"content": text, "special": special, "normalized": False}
        for i, (text, special) in enumerate(shape.added)
    }
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": added,
        "bos_token": "<bos>" if gemma else "<s>",
        "eos_token": "<eos>" if gemma else "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": "GemmaTokenizer" if gemma else "LlamaTokenizer",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if shape.with_json:
        make_sentencepiece_json(folder, config)


def make_sentencepiece_json(folder: Path, config: dict[str, Any]) -> None:
    """Write the same vocabulary as tokenizer.json, as Gemma's is."""
    pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokens = [pieces.id_to_piece(i) for i in range(len(pieces))]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token in tokens:  # in the order of their scores, each from the best of its halves
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        halves = [pair for pair in halves if pair[0] in vocab and pair[1] in vocab]
        normal = not any(
            (pieces.is_control(i), pieces.is_byte(i), pieces.is_unknown(i)) for i in [vocab[token]]
        )
        if normal:
            merges += sorted(halves, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([config["bos_token"], config["eos_token"], "<pad>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)


def make_bpe(folder: Path, shape: Shape) -> None:
    assert shape.pre is not None
    steps = PRE_TOKENIZERS[shape.pre]
    tokenizer = Tokenizer(models.BPE(ignore_merges=shape.ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps(pre_tokenizers))
    if shape.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.n_tokens, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.train([str(CORPUS)], trainer)
    tokenizer.add_special_tokens([text for text, special in shape.added if special])
    tokenizer.add_tokens([text for text, special in shape.added if not special])
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    first = shape.added[0][0]
    config = {
        "add_prefix_space": False,
        "bos_token": first if shape.has_bos else None,
        "eos_token": first,
        "pad_token": first,
        "tokenizer_class": shape.tokenizer_class,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def encode(folder: Path, shape: Shape) -> list[int]:
    """Ids of the text by the tokenizer's own library."""
    if shape.pre is None:
        processor = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        ids: list[int] = processor.encode(TEXT)
        return ids
    return list(AutoTokenizer.from_pretrained(folder).encode(TEXT, add_special_tokens=False))


# -- llama.cpp's converter -------------------------------------------------------------------------


def convert(folder: Path, pre: str | None, llama_cpp: Path, outtype: str) -> dict[str, Any]:
    """Run the converter, and describe the file that it wrote."""
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    import gguf
    from conversion import get_model_class
    from conversion.base import TextModel

    # The converter knows published vocabularies only, by a hash of what they make of a text.
    TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
    file_type = {"f32": "ALL_F32", "f16": "MOSTLY_F16"}[outtype]
    target = folder.parent / f"{outtype}.gguf"
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = get_model_class(name)(folder, gguf.LlamaFileType[file_type], target)
    model.write()
    reader = gguf.GGUFReader(target)
    metadata = {}
    left_out = ("GGUF.", "general.file_type", "general.quantization_version")
    for key, field in reader.fields.items():
        if not key.startswith(left_out):
            metadata[key] = typed_value(field)
    tensors = {
        tensor.name: [
            [int(n) for n in reversed(tensor.shape)],
            hashlib.sha256(np.ascontiguousarray(tensor.data).tobytes()).hexdigest()[:32],
            *([tensor.tensor_type.name] if outtype == "f16" else []),
        ]
        for tensor in reader.tensors
    }
    return {"metadata": metadata, "tensors": tensors}


def describe_configs(path: Path, llama_cpp: Path) -> None:
    """Write down what the converter makes of each configuration in configs.json."""
    known = json.loads(path.read_text())
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    import gguf
    from conversion import get_model_class

    for entry in known.values():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            (folder / "config.json").write_text(json.dumps(entry["config"]))
            save_file({}, folder / "model.safetensors")
            reader = get_model_class(entry["config"]["architectures"][0])
            file_type = gguf.LlamaFileType.ALL_F32
            model = reader(folder, file_type, folder / "x.gguf")
            entry["tensors"] = {
                name: [float(x) for x in tensor] for name, tensor in model.generate_extra_tensors()
            }
            model.set_gguf_parameters()
            found = model.gguf_writer.kv_data[0].items()
            entry["metadata"] = {
                key: value.value for key, value in found if not key.startswith("general.")
            }
    lines = (f" {json.dumps(name)}: {json.dumps(entry)}" for name, entry in known.items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def typed_value(field: Any) -> str:
    """The bytes of a typed value, in hex; their hash where there are many."""
    raw = b"".join(part.tobytes() for part in field.parts[2:])
    return raw.hex() if len(raw) <= 80 else f"sha256:{hashlib.sha256(raw).hexdigest()}"


def main() -> None:
    """Make all fixtures, or those named."""
    llama_cpp = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as scratch:
        out = shutil.copytree(unpacked("architectures"), Path(scratch) / "architectures")
        describe_configs(out / "configs.json", llama_cpp)
        for name in sys.argv[2:] or SHAPES:
            print(name, flush=True)
            make(out / name, name, SHAPES[name], llama_cpp)
            size = sum(path.stat().st_size for path in (out / name).rglob("*"))
            print(f"  {size / 1000:.0f} kB", flush=True)
        pack(out, "architectures")


if __name__ == "__main__":
    main()
