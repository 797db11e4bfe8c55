"""Codecs at every vector width of this processor, one core, beside ggml's C built for the same level.

    benchmarks/bench_widths.py [--types Q4_K,Q5_K] [--folder FOLDER]

Each level of x86-64 is measured in a process of its own by bench_kernels.py. Below this processor's own level
kernels are compiled for the level (tools/processors.py), and benchmarks/make-ggml builds ggml for it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from measure import CACHE, ROOT, finish, run, table

sys.path.insert(0, str(ROOT))
from tests.support.processors import levels_here
from tools.processors import environment

HERE = Path(__file__).resolve().parent
BITS = {"x86-64-v2": 128, "x86-64-v3": 256, "x86-64-v4": 512}
WAYS = ("encode", "decode")


def measure(level: str, folder: Path, types: str | None) -> list[dict[str, Any]]:
    """Return the rows that bench_kernels.py finds for codecs at one level."""
    words: list[str | Path] = [sys.executable, HERE / "bench_kernels.py", "--codecs-only"]
    words += ["--types", types] if types else []
    stand_in = {} if level == levels_here()[-1] else _stand_in(level, folder)
    cost = run(words, stand_in, shows_progress=True)
    rows: list[dict[str, Any]] = json.loads(cost.output.splitlines()[-1])["rows"]["codecs"]
    return rows


def _stand_in(level: str, folder: Path) -> dict[str, str]:
    build = [str(HERE / "make-ggml"), str(folder), level, sys.executable]
    library = subprocess.run(build, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    return {**environment(level), "EDGEMERGE_GGML": library}


def render(found: dict[str, list[dict[str, Any]]]) -> str:
    """Return the Markdown table of SPEED.md: million elements per CPU second, and the ratio to ggml."""
    head = ["type", *(f"{way}, {BITS[level]} bits" for way in WAYS for level in found)]
    rows = [
        [str(sides[0]["type"]), *(_cell(side, way) for way in WAYS for side in sides)]
        for sides in zip(*found.values(), strict=True)
    ]
    return table(head, rows)


def _cell(row: dict[str, Any], way: str) -> str:
    return f"{row[way]:.0f}, {row[way] / row[f'ggml_{way}']:.1f}x" if way in row else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", help="these codecs only")
    parser.add_argument("--folder", type=Path, default=CACHE / "ggml")
    options = parser.parse_args()
    found = {level: measure(level, options.folder, options.types) for level in levels_here()}
    finish("widths", render(found), found)


if __name__ == "__main__":
    main()
