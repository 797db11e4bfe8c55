"""Odd models through run, eval, bench and serve: `python -m tools.fuzz.odd FIRST LAST`, numbers of models.

Each is drawn from its number (`tests/support/odd_models.py`) and tried in a process of its own. A finding is
a header that passes `edgemerge.formats.llama_rules` and at which llama.cpp ends the process, hangs or fails
with a traceback; its file is left in build/fuzz/odd. Mend it by a rule, and the rule by a test.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.support.odd_models import make_bases, odd_model
from tests.support.odd_runs import try_model

__all__ = ["find_odd"]


def find_odd(seeds: range, folder: Path) -> Iterator[tuple[int, str]]:
    """Try models; yield the number of each that is a finding, and what it did.

    Parameters
    ----------
    seeds : range
        Numbers of the models.
    folder : Path
        An empty one; files of findings stay in it.
    """
    bases = make_bases(folder)
    for seed in seeds:
        model = odd_model(bases, seed)
        path = model.write(folder / f"odd-{seed}.gguf")
        outcome = try_model(path)
        if not outcome.findings:
            path.unlink()
            path.with_suffix(".txt").unlink(missing_ok=True)
            continue
        yield (
            seed,
            f"{model.architecture}, {'; '.join(model.changes)}: {'; '.join(outcome.findings)}",
        )


def main() -> int:
    """Try the models that the command line numbers; 0 where nothing was found."""
    first, last = map(int, sys.argv[1:])
    n_found = 0
    with tempfile.TemporaryDirectory() as name:
        for seed, what in find_odd(range(first, last), Path(name)):
            kept = Path("build/fuzz/odd") / f"{seed}.gguf"
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes((Path(name) / f"odd-{seed}.gguf").read_bytes())
            print(f"{kept}: {what}", flush=True)
            n_found += 1
    print(f"{last - first} models, {n_found} findings")
    return 1 if n_found else 0


if __name__ == "__main__":
    sys.exit(main())
