"""Run the benchmarks and write their tables into README.md and QUALITY.md, between their markers.

benchmarks/run.py                    all that need nothing
benchmarks/run.py merge quality      these; options that run.py does not know go to bench_merge
benchmarks/run.py serve MODEL.gguf   what is no benchmark's name goes to it, too: serve and llama need models
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
QUALITY = HERE / "QUALITY.md"
ALONE = ("kernels", "align", "merge", "requant", "quality")
WITH_MODELS = ("serve", "llama")


def rewrite(name: str, table: str, about: dict[str, str]) -> None:
    """Replace the text between `<!-- bench:NAME -->` and `<!-- /bench -->`."""
    stamp = ", ".join(f"{key} {value}" for key, value in about.items())
    pattern = re.compile(rf"(<!-- bench:{name} -->\n).*?(<!-- /bench -->)", re.DOTALL)
    page = QUALITY if name == "quality" else README
    text, count = pattern.subn(
        lambda m: f"{m[1]}{table}\n\nMeasured on: {stamp}.\n{m[2]}", page.read_text()
    )
    if count != 1:
        raise SystemExit(f"{page.name} has no place for the benchmark {name}")
    page.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = (*ALONE, *WITH_MODELS)
    parser.add_argument("words", nargs="*", metavar="name", help=", ".join(known))
    options, rest = parser.parse_known_args()
    names = [word for word in options.words if word in known] or ALONE
    rest = [word for word in options.words if word not in known] + rest
    results = []
    for name in names:
        extra = rest if name in ("merge", *WITH_MODELS) else []
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
