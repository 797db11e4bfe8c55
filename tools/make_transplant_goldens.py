#!/usr/bin/env python3
"""Make tests/data/transplants.json: the rows that mergekit finds for the tokens of another model.

    python -m tools.make_transplant_goldens

Needs mergekit 0.1.5, which edgemerge does not. `kin` is what mergekit-tokensurgeon writes for two
vocabularies of one kind, from row KEPT on. `wide` is what its pursuit finds for a donor of another kind and
width, with the common tokens that edgemerge finds, as mergekit takes a few less. Kept is a sum of each row.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch  # noqa: TID251
from mergekit.tokensurgeon import batch_omp

from edgemerge.formats import open_model
from edgemerge.formats.tokenizer.shared import find_shared
from tests.support.places import TESTS
from tests.support.safetensors_files import read_safetensors
from tests.support.transplants import KEPT, STEP, WIDE_DONOR, K, make_pair
from tests.support.vocabularies import EMBEDDING, HEAD, row_sums

OUT = TESTS / "data" / "transplants.json"


def kin(model: Path, donor: Path, target: Path) -> dict[str, list[float]]:
    """Transplant by mergekit."""
    run = ["mergekit-tokensurgeon", model, donor, target, "--k", str(K)]
    subprocess.run(list(map(str, run)), check=True)
    found = read_safetensors(target / "model.safetensors")
    return {name: row_sums(found[name])[KEPT:] for name in (EMBEDDING, HEAD)}


def wide(model: Path) -> dict[str, list[float]]:
    """Pursue by mergekit some tokens that only the donor has."""
    shared = find_shared(open_model(WIDE_DONOR).metadata(), open_model(model).metadata())
    ids = np.flatnonzero(shared >= 0)
    new = np.flatnonzero(shared < 0)[::STEP]
    theirs = torch.tensor(read_safetensors(WIDE_DONOR / "model.safetensors")[EMBEDDING]).float()
    places, parts = batch_omp(theirs[new], theirs[ids], K)
    ours = read_safetensors(model / "model.safetensors")
    made = {}
    for name in (EMBEDDING, HEAD):
        points = torch.tensor(ours[name][shared[ids]])
        made[name] = row_sums(torch.bmm(parts.unsqueeze(1), points[places]).squeeze(1).numpy())
    return made


def main() -> None:
    """Answer both."""
    with tempfile.TemporaryDirectory() as folder:
        model, donor = make_pair(Path(folder))
        found = {"kin": kin(model, donor, Path(folder) / "out"), "wide": wide(model)}
    OUT.write_text(json.dumps(found, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
