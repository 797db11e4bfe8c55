#!/usr/bin/env python3
"""Make tests/data/unions.json: what mergekit and transformers make of models with tokens of their own.

    python -m tools.make_union_goldens

Needs mergekit 0.1.5 and transformers, which edgemerge does not. Kept are the texts of the tokens after the
base's, the ids of a text, and of embedding and head a sum of each of the last rows and one of all rows.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerFast  # noqa: TID251

from tests.support.places import TESTS
from tests.support.safetensors_files import read_safetensors
from tests.support.vocabularies import (
    CASES,
    EMBEDDING,
    HEAD,
    KINDS,
    TEXTS,
    make_models,
    row_sums,
)

OUT = TESTS / "data" / "unions.json"
KEPT = 4  # rows before the new ones


def facts(folder: Path, kind: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """Merge by mergekit, and read what came of it."""
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
    run = ["mergekit-yaml", "recipe.yml", "out", "--no-write-model-card", "--quiet"]
    subprocess.run(run, cwd=folder, check=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "out" / "tokenizer.json"))
    base = PreTrainedTokenizerFast(tokenizer_file=str(folder / "base" / "tokenizer.json"))
    first = len(base.get_vocab())
    tensors = read_safetensors(folder / "out" / "model.safetensors")
    found: dict[str, Any] = {
        "first": first,
        "new": [tokenizer.added_tokens_decoder[i].content for i in range(first, len(tokenizer))],
        "ids": tokenizer.encode(TEXTS[kind], add_special_tokens=False),
    }
    for name in (EMBEDDING, HEAD):
        if name in tensors:
            sums = row_sums(tensors[name])
            found[name] = {"last": sums[first - KEPT :], "all": sum(sums), "n_rows": len(sums)}
    return found


def main() -> None:
    """Merge all cases."""
    results = {}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as name:
            make_models(kind, Path(name))
            for case, (of_kind, recipe) in CASES.items():
                if of_kind == kind:
                    results[case] = facts(Path(name), kind, recipe)
                    subprocess.run(["rm", "-r", Path(name) / "out"], check=True)
    OUT.write_text(json.dumps(results, indent=0, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
