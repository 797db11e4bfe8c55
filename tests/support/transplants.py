"""Models and donors whose transplants mergekit answered; also run by tools/make_transplant_goldens.py."""

from __future__ import annotations

from pathlib import Path

from tests.support.fixtures import unpacked
from tests.support.vocabularies import make_model

WIDE_DONOR = unpacked("models") / "base"  # SentencePiece, 4096 tokens of width 256, tied
K = 16
KEPT = 330  # first row that is compared of a donor of the same kind
STEP = 97  # of the many new tokens, each STEP-th is compared
KINSHIP = {f"[Word{i}]": i % 2 == 0 for i in range(30)} | {"<|call|>": True}


def make_pair(folder: Path) -> tuple[Path, Path]:
    """Make a model, and a donor with more tokens of the same kind; both have heads of their own."""
    model = make_model("bpe", folder / "model", {"[Lab]": False, "<|call|>": True}, 1)
    return model, make_model("bpe", folder / "donor", KINSHIP, 2)
