"""Compares directories that are made of GGUF files with transformers, and notes what was made.

    python -m tools.check_directories

Needs torch, transformers and sentencepiece. For every model of tests/data/architectures and each of its
variants, a GGUF in float32 is converted to a directory. transformers loads that. Its logits have to be those
that it computed for the model itself, within 1e-6, its tokens those of the model's own tokenizer. The
digests of what was made go into tests/data/made_configs.json, so that the tests need no torch.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from edgemerge.merging.run import merge
from edgemerge.recipe.recipe import make_recipe
from tests.support.architecture_models import CASES, convert, copy_model, facts, logits
from tests.support.directories import made_digest, read_stored
from tests.support.places import TESTS

MOST = 1e-6  # of a difference between logits


def check(name: str, variant: str, folder: Path) -> str:
    """Make one directory, and return its digest."""
    expected = facts(name)
    model = copy_model(name, expected["converter"][variant]["config"], folder)
    source = convert(model, folder / "model.gguf")
    made = folder / "made"
    dtype = next(iter(read_stored(model).values()))[0]
    recipe = make_recipe("passthrough", [(str(source), None)], out_type=dtype, out_format="hf")
    merge(recipe, made, threads=1)
    found, ids = compute(made, expected)
    difference = float(np.abs(found - logits(name, variant)).max())
    if not difference <= MOST:
        raise SystemExit(f"{name} {variant}: logits differ by {difference}")
    if ids != expected["text_ids"]:
        raise SystemExit(f"{name} {variant}: tokens are {ids}, not {expected['text_ids']}")
    print(f"{name} {variant}: {difference:.1e}")
    return made_digest(made)


def compute(made: Path, expected: dict[str, Any]) -> tuple[Any, list[int]]:
    """Return transformers' logits at the positions that are kept, and its tokens of the text."""
    import torch  # noqa: TID251
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: TID251

    model, told = AutoModelForCausalLM.from_pretrained(
        made, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    if any(told.values()):
        raise SystemExit(f"{made}: {told}")
    with torch.no_grad():
        found = model(torch.tensor([expected["tokens"]])).logits[0, expected["shown"]].numpy()
    tokenizer = AutoTokenizer.from_pretrained(made)
    return found, tokenizer(expected["text"], add_special_tokens=False)["input_ids"]


def main() -> None:
    """Check all cases and write the digests."""
    digests = {}
    for name, variant in CASES:
        with tempfile.TemporaryDirectory() as folder:
            digests[f"{name}-{variant}"] = check(name, variant, Path(folder))
    target = TESTS / "data" / "made_configs.json"
    target.write_text(json.dumps(digests, indent=0) + "\n")


if __name__ == "__main__":
    main()
