#!/usr/bin/env python3
"""Make tests/data/odd_directories.json: what transformers computes and llama.cpp's converter writes of
directories as other tools leave them (tests/support/odd_directories.py).

    python -m tools.make_odd_directories LLAMA_CPP_SOURCE

Needs torch, transformers, sentencepiece and gguf, as make_architecture_fixtures.py does.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch  # noqa: TID251
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: TID251

from tests.support.architecture_models import NAMES, facts
from tests.support.odd_directories import (
    ARCHITECTURES,
    BASE,
    EXPECTED,
    PLAIN,
    SHOWN,
    SPECIAL,
    TEXT,
    with_head,
    with_tokens,
)

EOS = "eos_token_id"


def logits(folder: Path, tokens: list[int]) -> list[float]:
    """Return the first logits of the last position, as transformers computes them."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        found = model(torch.tensor([tokens])).logits[0, -1, :SHOWN]
    return [round(float(x), 6) for x in found]


def convert(folder: Path, llama_cpp: Path, pre: str | None) -> Any:
    """Run llama.cpp's converter; return a reader of what it wrote."""
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    import gguf
    from conversion import get_model_class
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
    target = folder.parent / f"{folder.name}.gguf"
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    get_model_class(name)(folder, gguf.LlamaFileType.ALL_F32, target).write()
    return gguf.GGUFReader(target)


def main() -> None:
    """Write the file."""
    llama_cpp = Path(sys.argv[1])
    expected: dict[str, Any] = {"heads": {}, "tokens": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for name in NAMES:
            folder = with_head(name, Path(scratch), tied=True, head="trained")
            written = convert(folder, llama_cpp, "gpt-2")
            expected["heads"][name] = {
                "logits": logits(folder, facts(name)["tokens"]),
                "converter": any(t.name == "output.weight" for t in written.tensors),
            }
        for name, source in (("spm", BASE), ("bpe", ARCHITECTURES / "llama")):
            folder = with_tokens(source, Path(scratch) / name)
            (folder / "tokenizer.model").unlink(missing_ok=True)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            written = convert(folder, llama_cpp, "llama-bpe")
            tokens = written.fields["tokenizer.ggml.tokens"].contents()
            types = written.fields["tokenizer.ggml.token_type"].contents()
            expected["tokens"][name] = {
                "ids": list(tokenizer(TEXT, add_special_tokens=False).input_ids),
                "shown": tokenizer.decode(tokenizer(TEXT).input_ids, skip_special_tokens=True),
                "types": {text: types[tokens.index(text)] for text in SPECIAL + PLAIN},
                EOS: written.fields[f"tokenizer.ggml.{EOS}"].contents(),
                "template": written.fields["tokenizer.chat_template"].contents(),
            }
    lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in expected.items())
    EXPECTED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
