"""Run the benchmarks; write their tables into docs/ and SPEED.md, between markers.

The README's table of four rows is then made from these (summary.py).

benchmarks/run.py                    all that need nothing
benchmarks/run.py merge quality      these
benchmarks/run.py merge --shape zoo  options that run.py does not know go to the one benchmark asked for
benchmarks/run.py 7b                 only when asked for: needs 18 GB of disk
benchmarks/run.py serve MODEL.gguf   only when asked for: what is no benchmark's name goes to it
benchmarks/run.py llama MODEL.gguf --peers .venv-peers
                                     only when asked for: bench beside llama-bench
benchmarks/run.py methods            only when asked for: needs 7 GB of disk
benchmarks/run.py quality135         only when asked for: downloads a model of 93 MB, needs two adapters
benchmarks/run.py barrier --torch PYTHON
                                     only when asked for: trains six small models by a Python with torch
benchmarks/run.py delta              only when asked for: as quality135
benchmarks/run.py fleet              only when asked for: as quality135, and needs root for network namespaces
benchmarks/run.py boards card prediction
                                     only when asked for: small boards; needs root and control groups
benchmarks/run.py recipes --peers .venv-peers
                                     only when asked for: public recipes, by mergekit too
benchmarks/run.py arm                only when asked for: needs a cross compiler and llvm-mca (ARM.md)
benchmarks/run.py widths             only when asked for: builds ggml for older processors, needs cmake
benchmarks/run.py server MODEL.gguf --peers .venv-peers
                                     only when asked for: serve beside llama-server
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import summary
from measure import run

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs"
NAMES = ("benchmarks", "quality", "align", "scale", "delta", "fleet", "boards")
PAGES = [*(DOCS / f"{name}.md" for name in NAMES), HERE / "SPEED.md", HERE / "ARM.md"]
ALONE = ["kernels", "align", "merge", "requant", "quality", "importance", "start", "profile"]
ALONE += ["memory", "scaling", "workers"]
WHEN_ASKED = ["7b", "serve", "server", "llama", "recipes", "quality135", "methods", "barrier"]
WHEN_ASKED += ["cluster", "delta", "fleet", "boards", "card", "limits", "prediction", "arm"]
WHEN_ASKED += ["widths"]


def rewrite(name: str, table: str, about: dict[str, str]) -> None:
    """Replace the text between `<!-- bench:NAME -->` and `<!-- /bench -->`."""
    stamp = ", ".join(f"{key} {value}" for key, value in about.items())
    pattern = re.compile(rf"(<!-- bench:{name} -->\n).*?(<!-- /bench -->)", re.DOTALL)
    for page in PAGES:
        text, count = pattern.subn(
            lambda m: f"{m[1]}{table}\n\nMeasured on: {stamp}.\n{m[2]}", page.read_text()
        )
        if count:
            page.write_text(text)
            return
    raise SystemExit(f"no page has a place for the benchmark {name}")


def tables(lines: Sequence[str]) -> str:
    """Return the Markdown tables of an output, and what stands between them."""
    found = [i for i, line in enumerate(lines) if line.startswith("|")]
    return "\n".join(lines[found[0] : found[-1] + 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = (*ALONE, *WHEN_ASKED)
    parser.add_argument("words", nargs="*", metavar="name", help=", ".join(known))
    options, rest = parser.parse_known_args()
    names = [word for word in options.words if word in known] or ALONE
    rest = [word for word in options.words if word not in known] + rest
    if rest and len(names) > 1:
        parser.error(f"whose is {rest[0]}? Options go to one benchmark")
    results = []
    for name in names:
        print(f"== {name}", file=sys.stderr)
        command: list[str | Path] = [sys.executable, HERE / f"bench_{name}.py", *rest]
        lines = run(command, shows_progress=True).output.strip().splitlines()
        result = json.loads(lines[-1])
        table = tables(lines)
        print(table)
        rewrite(name, table, result["machine"])
        results.append(result)
    summary.write()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
