"""What each method is worth: two real experts merged, scored on 1300 held-out questions by llama.cpp.

The models are those of tests/models: one base, an expert on diseases, an expert on substances. Each row
is a merge with the given settings, each type one file. Accuracy is lm-evaluation-harness's `acc`; one
standard error is about 2.2 points on the medical sets and 2.9 on the general one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from measure import machine, table

from edgemerge import make_recipe, merge
from edgemerge.presets import with_preset
from edgemerge.runtime.evaluate import evaluate, read_questions
from edgemerge.runtime.llama import Model

MODELS = Path(__file__).resolve().parents[1] / "tests" / "models"
SETS = ("disease", "substance", "general")
TYPES = ("F16", "Q8_0", "Q4_K_M")
EXPERTS = ("expert-a", "expert-b")
# label, method, parameters, preset
ROWS: tuple[tuple[str, str, dict[str, Any], str | None], ...] = (
    ("base", "passthrough", {}, None),
    ("expert-a", "passthrough", {}, None),
    ("expert-b", "passthrough", {}, None),
    ("linear (paper)", "linear", {}, "paper"),
    ("task_arithmetic (paper)", "task_arithmetic", {}, "paper"),
    ("dare_ties (paper)", "dare_ties", {}, "paper"),
    ("della (paper)", "della", {}, "paper"),
    ("breadcrumbs (paper)", "breadcrumbs", {}, "paper"),
    ("slerp t=0.5", "slerp", {"t": 0.5}, None),
    ("task_arithmetic lambda=0.7", "task_arithmetic", {"lambda": 0.7}, None),
    ("ties density=0.5", "ties", {"density": 0.5}, None),
    ("dare_linear density=0.6 lambda=0.7", "dare_linear", {"density": 0.6, "lambda": 0.7}, None),
    ("dare_ties density=0.6 lambda=0.7", "dare_ties", {"density": 0.6, "lambda": 0.7}, None),
    (
        "della_linear density=0.6 epsilon=0.05 lambda=0.7",
        "della_linear",
        {"density": 0.6, "epsilon": 0.05, "lambda": 0.7},
        None,
    ),
    ("breadcrumbs density=0.9 lambda=0.7", "breadcrumbs", {"density": 0.9, "lambda": 0.7}, None),
    (
        "breadcrumbs_ties density=0.9 lambda=0.7",
        "breadcrumbs_ties",
        {"density": 0.9, "lambda": 0.7},
        None,
    ),
)


def make(row: tuple[str, str, dict[str, Any], str | None], out_type: str, output: Path) -> None:
    """Merge one row of the table into a file."""
    label, method, parameters, preset = row
    base, models = "base", EXPERTS
    if method == "passthrough":
        models = (label,)
    if method == "slerp":
        base, models = EXPERTS
        models = (models,)
    recipe = make_recipe(
        method,
        [(str(MODELS / name), None) for name in models],
        base=None if method in ("linear", "passthrough") else str(MODELS / base),
        parameters=parameters,
        out_type=out_type,
    )
    merge(with_preset(recipe, preset) if preset else recipe, output, force=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, help="questions per set")
    options = parser.parse_args()
    questions = {name: read_questions(MODELS / "eval" / f"{name}.jsonl") for name in SETS}
    questions = {name: items[: options.limit] for name, items in questions.items()}
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "model.gguf"
        for row in ROWS:
            entry: dict[str, Any] = {"label": row[0]}
            for out_type in TYPES:
                make(row, out_type, output)
                with Model(output) as model:
                    entry[out_type] = {
                        name: evaluate(model, items).acc for name, items in questions.items()
                    }
            figures.append(entry)
    print(render(figures))
    print(json.dumps({"bench": "quality", "machine": machine(), "rows": figures}))


def render(figures: list[dict[str, Any]]) -> str:
    """Return the Markdown table of the README: percent right, disease / substance / general."""
    rows = [
        [
            entry["label"],
            *(" / ".join(f"{100 * entry[t][name]:.1f}" for name in SETS) for t in TYPES),
        ]
        for entry in figures
    ]
    return table(["merge", *TYPES], rows)


if __name__ == "__main__":
    main()
