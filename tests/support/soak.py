"""Merge again and again in one process: `python -m tests.support.soak MODEL_A MODEL_B FOLDER N`.

Prints a JSON list with, after each merge, resident memory in bytes, open files and threads.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

from edgemerge.machine.process import read_process
from edgemerge.merging.run import merge
from edgemerge.recipe.recipe import make_recipe

METHODS = {
    "linear": {},
    "ties": {"density": 0.7},
    "dare_ties": {"density": 0.7},
    "breadcrumbs": {"density": 0.7},
}


def main() -> None:
    """Merge by one method after the other, each time to another type."""
    first, second, folder, count = sys.argv[1:]
    found = []
    for i in range(int(count)):
        method = list(METHODS)[i % len(METHODS)]
        recipe = make_recipe(
            method,
            [(second, 0.5)] if method != "linear" else [(first, 0.5), (second, 0.5)],
            base=None if method == "linear" else first,
            parameters=METHODS[method],
            out_type="Q8_0" if i // len(METHODS) % 2 else "F16",
            seed=i,
        )
        merge(recipe, Path(folder) / "out.gguf", threads=2, force=True)
        gc.collect()
        n_files, n_threads = (len(os.listdir(f"/proc/self/{what}")) for what in ("fd", "task"))
        found.append((read_process().rss, n_files, n_threads))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
