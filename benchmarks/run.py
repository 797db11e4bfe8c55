"""Run the benchmarks and write their tables into the README, between its markers.

benchmarks/run.py                    all of them; options it does not know go to bench_merge
benchmarks/run.py merge quality
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from measure import run

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
BENCHMARKS = ("kernels", "align", "merge", "quality")


def rewrite(name: str, table: str, about: dict[str, str]) -> None:
    """Replace the text between `<!-- bench:NAME -->` and `<!-- /bench -->`."""
    stamp = ", ".join(f"{key} {value}" for key, value in about.items())
    pattern = re.compile(rf"(<!-- bench:{name} -->\n).*?(<!-- /bench -->)", re.DOTALL)
    text, count = pattern.subn(
        lambda m: f"{m[1]}{table}\n\nMeasured on: {stamp}.\n{m[2]}", README.read_text()
    )
    if count != 1:
        raise SystemExit(f"README.md has no place for the benchmark {name}")
    README.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=BENCHMARKS, help=", ".join(BENCHMARKS))
    options, rest = parser.parse_known_args()
    results = []
    for name in options.names:
        extra = rest if name == "merge" else []
        print(f"== {name}", file=sys.stderr)
        lines = run([sys.executable, HERE / f"bench_{name}.py", *extra]).output.strip().splitlines()
        result = json.loads(lines[-1])
        table = "\n".join(line for line in lines if line.startswith("|"))
        print(table)
        rewrite(name, table, result["machine"])
        results.append(result)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
