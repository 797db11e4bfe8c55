"""A folder of small models, a delta and questions, for the merges of the page."""

from __future__ import annotations

from pathlib import Path

from edgemerge.merging.delta import DeltaSettings, make_delta
from tests.support.serving import make_served_gguf

__all__ = ["N_QUESTIONS", "make_merge_folder"]

N_QUESTIONS = 6  # of each file: an answer takes a tenth of a second


def make_merge_folder(models_dir: Path, folder: Path) -> Path:
    """Write base, expert-a, delta-b (of expert-b) as GGUF, and disease and general as questions."""
    for name in ("base", "expert-a", "expert-b"):
        make_served_gguf(models_dir, folder / f"{name}.gguf", name)
    expert = folder / "expert-b.gguf"
    make_delta(
        folder / "base.gguf", expert, folder / "delta-b.gguf", DeltaSettings(bits=4), threads=1
    )
    expert.unlink()
    for name in ("disease", "general"):
        lines = (models_dir / "eval" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:N_QUESTIONS]), encoding="utf-8")
    return folder
