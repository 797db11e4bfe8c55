#!/usr/bin/env python3
"""Make tests/data/tokenizers: ways of cutting text into tokens, and what they make of one text.

    python tools/make_tokenizer_fixtures.py

Needs tokenizers and sentencepiece, which edgemerge does not. All byte-level BPE cuts share one
vocabulary, whose merges were learnt without any cutting: so each cut shows in the tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.architecture_shapes import PRE_TOKENIZERS

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "tests" / "data" / "tokenizers"
LICENSE = (ROOT / "LICENSE").read_text()
TEXT = (
    "Hello World, HTTPServer's camelCase IDs: I'll, WE'RE, it's 3 33 333 3333 12345678.90!\n\n"
    "  \t naïve façade — Ünïcödé, нещо на Български, 我想在 apple 工作 1314 天~ 🦙🚀👩‍🚀\n"
    "def f(x_1):\n\treturn x[1:] != {'a': 0x1F}  # done???   \n    </s>== ''''''```\r\n end "
)
IGNORED_MERGES = ("llama-bpe", "tekken")
# Without bytes for what the vocabulary lacks, as T5's
PLAIN = (
    "Permission is hereby granted, free of charge, to any person, 2024: a copy  of the Software é ж"
)


def make_cuts() -> None:
    """Write cuts.json: a vocabulary, and by name a pre-tokenizer and the ids it leads to."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        max_token_length=9,
    )
    lines = [*LICENSE.splitlines(keepends=True), *[TEXT] * 12, *TEXT.splitlines() * 12]
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    cuts: dict[str, Any] = {}
    for name, steps in PRE_TOKENIZERS.items():
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps(pre_tokenizers))
        written = json.loads(tokenizer.to_str())
        written["model"]["ignore_merges"] = name in IGNORED_MERGES
        cut = Tokenizer.from_str(json.dumps(written))
        cuts[name] = {
            "pre_tokenizer": written["pre_tokenizer"],
            "ignore_merges": name in IGNORED_MERGES,
            "ids": cut.encode(TEXT, add_special_tokens=False).ids,
        }
    written |= {"pre_tokenizer": None}
    facts = {"text": TEXT, "tokenizer": written, "cuts": cuts}
    text = json.dumps(facts, ensure_ascii=False, separators=(",", ":"))
    (OUT / "cuts.json").write_text(text + "\n")


def make_unigram() -> None:
    """Write one Unigram vocabulary as tokenizer.model and as tokenizer.json."""
    folder = OUT / "unigram"
    folder.mkdir(exist_ok=True)
    SentencePieceTrainer.train(
        input=str(ROOT / "LICENSE"),
        model_prefix=str(folder / "tokenizer"),
        model_type="unigram",
        vocab_size=200,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(len(pieces))]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ids = pieces.encode(PLAIN)
    assert ids == tokenizer.encode(PLAIN).ids
    (folder / "expected.json").write_text(json.dumps({"text": PLAIN, "ids": ids}) + "\n")


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    make_cuts()
    make_unigram()
