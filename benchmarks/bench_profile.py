"""Where the time of a merge goes: CPU seconds of every step, method by method, with one worker.

    benchmarks/bench_profile.py [--shape tinyllama] [--methods ties ...]

The models are bench_merge's: a bf16 base and two experts, to Q4_K_M. tools/profile_merge.py measures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench_merge import FILE_TYPE, METHODS, make_models, recipe
from measure import CACHE, ROOT, Merge, finish, table

sys.path.insert(0, str(ROOT))
from tools.profile_merge import SECTIONS, add_up

LEAST_S = 0.005  # what no method spends more on makes no row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=CACHE)
    parser.add_argument("--shape", default="tinyllama")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--memory", default="384MiB")
    options = parser.parse_args()
    models = make_models(options.work, options.shape)
    profiles: dict[str, dict[str, Any]] = {}
    for method in options.methods:
        request = options.work / "recipe.yml"
        request.write_text(recipe(method, models))
        merge = Merge((str(request), "--type", FILE_TYPE))
        output = options.work / "profiled.gguf"
        merge.run(output)  # compiles what is not compiled
        profiles[method] = merge.profile(output, memory=options.memory, threads=1)
    rows = [{"method": method, **profile} for method, profile in profiles.items()]
    finish("profile", render(profiles), rows)


def render(profiles: Mapping[str, dict[str, Any]]) -> str:
    """Return the Markdown table of SPEED.md: a column per method."""
    spent = {method: add_up(one["sections"], "cpu_s") for method, one in profiles.items()}
    lines = [
        [section, *(f"{times[section]:.2f}" for times in spent.values())]
        for section in SECTIONS
        if any(times[section] >= LEAST_S for times in spent.values())
    ]
    lines.append(["CPU s in all", *(f"{one['cpu_s']:.2f}" for one in profiles.values())])
    lines.append(["wall s", *(f"{one['wall_s']:.2f}" for one in profiles.values())])
    return table(["CPU seconds, one worker", *profiles], lines)


if __name__ == "__main__":
    main()
