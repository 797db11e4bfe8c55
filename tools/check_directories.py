"""Compares directories that are made of GGUF files with transformers, and notes what was made.

    python -m tools.check_directories [NAME ...]

Needs torch, transformers and sentencepiece. For every model of tests/data/architectures and of
tests/support/generated_models.py, and each of its variants, a GGUF in float32 is converted to a directory.
transformers loads that. Its logits have to be those that it computed for the model itself, within 1e-6.
Those of generated models are stored with four digits, so there it is 1e-4. Its tokens have to be those of
the model's own tokenizer. The digests of what was made go into tests/data/made_configs.json, so that the
tests need no torch.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from edgemerge.merging.run import merge
from edgemerge.recipe.recipe import make_recipe
from tests.support.architecture_models import CASES, convert, copy_model, facts, logits
from tests.support.directories import made_digest, read_stored
from tests.support.generated_models import GENERATED_CASES, all_facts, make_model
from tests.support.places import TESTS

MOST, MOST_ROUNDED = 1e-6, 1e-4  # of a difference between logits
DIGESTS = TESTS / "data" / "made_configs.json"


def check(name: str, variant: str, folder: Path) -> str:
    """Make one directory of a stored model, and return its digest."""
    expected = facts(name)
    model = copy_model(name, expected["converter"][variant]["config"], folder)
    dtype = next(iter(read_stored(model).values()))[0]
    made = make_directory(model, folder, dtype)
    found, ids = compute(made, expected["tokens"], expected["shown"], expected["text"])
    difference = float(np.abs(found - logits(name, variant)).max())
    return judge(f"{name} {variant}", made, difference, MOST, ids, expected["text_ids"])


def check_generated(name: str, variant: str, folder: Path) -> str:
    """Make one directory of a generated model, and return its digest."""
    expected = all_facts()[name]
    answers = expected["variants"][variant]
    made = make_directory(make_model(name, folder / name, **answers["config"]), folder, "F32")
    positions = [int(i) for i in answers["logits"]]
    found, ids = compute(made, expected["tokens"], positions, expected["text"])
    wanted = np.array([*answers["logits"].values()])
    difference = float(np.abs(found[:, : wanted.shape[1]] - wanted).max())
    return judge(f"{name} {variant}", made, difference, MOST_ROUNDED, ids, expected["text_ids"])


def make_directory(model: Path, folder: Path, dtype: str) -> Path:
    """Convert a model to a GGUF, and that to a directory."""
    source = convert(model, folder / "model.gguf")
    recipe = make_recipe("passthrough", [(str(source), None)], out_type=dtype, out_format="hf")
    merge(recipe, folder / "made", threads=1)
    return folder / "made"


def judge(
    name: str, made: Path, difference: float, most: float, ids: list[int], wanted: list[int]
) -> str:
    """Return the digest of a directory, or end where it is not the model."""
    if not difference <= most:
        raise SystemExit(f"{name}: logits differ by {difference}")
    if ids != wanted:
        raise SystemExit(f"{name}: tokens are {ids}, not {wanted}")
    print(f"{name}: {difference:.1e}", flush=True)
    return made_digest(made)


def compute(
    made: Path, tokens: list[int], positions: list[int], text: str
) -> tuple[Any, list[int]]:
    """Return transformers' logits at some positions, and its tokens of the text."""
    import torch  # noqa: TID251
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: TID251

    model, told = AutoModelForCausalLM.from_pretrained(
        made, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    if any(told.values()):
        raise SystemExit(f"{made}: {told}")
    with torch.no_grad():
        found = model(torch.tensor([tokens]), use_cache=False).logits[0, positions].numpy()
    tokenizer = AutoTokenizer.from_pretrained(made)
    return found, tokenizer(text, add_special_tokens=False)["input_ids"]


def main() -> None:
    """Check all cases, or those of the models that are named, and write the digests."""
    digests = json.loads(DIGESTS.read_text()) if sys.argv[1:] else {}
    for cases, check_one in ((CASES, check), (GENERATED_CASES, check_generated)):
        for name, variant in cases:
            if name in (sys.argv[1:] or (name,)):
                with tempfile.TemporaryDirectory() as folder:
                    digests[f"{name}-{variant}"] = check_one(name, variant, Path(folder))
    DIGESTS.write_text(json.dumps(digests, indent=0) + "\n")


if __name__ == "__main__":
    main()
