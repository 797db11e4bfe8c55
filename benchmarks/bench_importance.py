"""What importances are worth as weights: experts merged with them, without, and with each other's.

By default the experts are those of tests/models. Each expert's importance matrix is measured on validation
questions of its domain with their right answers, and each merge is scored on the held-out ones. The interval
is 1.96 binomial standard errors, loss the mean negative log-likelihood per token of the right options, in
nats. The last rows have the matrices changed about: where they are as good, importances tell nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from bench_quality import MODELS
from measure import finish, table
from quality_scores import MEDICAL, SETS

from edgemerge import load_recipe, make_recipe, merge
from edgemerge.output.importance_file import write_importances
from edgemerge.runtime.activations import measure_importances
from edgemerge.runtime.evaluation.evaluate import evaluate
from edgemerge.runtime.evaluation.perplexity import cut_text
from edgemerge.runtime.evaluation.questions import read_questions
from edgemerge.runtime.llama import Model
from edgemerge.types import ignore_parts

CHUNK = 256  # tokens, the context of the models of tests/models
SUM = 2.0  # lambda at which a mean of two changes is their sum
LAMBDAS = (1.0, 0.7 * SUM)


def measure_matrix(model: Path, domain: str, folder: Path) -> Path:
    """Measure a model's importances on the validation questions of a domain."""
    half, text = folder / f"{domain}-f16.gguf", folder / f"{domain}.txt"
    merge(make_recipe("passthrough", [(str(model), None)], out_type="F16"), half)
    questions = read_questions(MODELS / "validation" / f"{domain}.jsonl")
    text.write_text("".join(question.solved for question in questions), encoding="utf-8")
    with Model(half) as loaded:
        chunks = cut_text(loaded, text, CHUNK)
        squares = measure_importances(
            loaded, chunks, n_batch=CHUNK, progress=ignore_parts("importance")
        )
    output = folder / f"{domain}.imatrix.gguf"
    write_importances(output, squares, dataset=Path(text.name), n_ctx=CHUNK)
    return output


def merge_weighted(
    base: Path,
    experts: Mapping[str, Path],
    matrices: Sequence[Path],
    parameters: Mapping[str, Any],
    output: Path,
) -> None:
    """Merge by the hierarchical method, each expert with a matrix."""
    pairs = zip(experts.values(), matrices, strict=True)
    document = {
        "merge_method": "hierarchical",
        "base_model": str(base),
        "models": [{"model": str(model), "imatrix": str(matrix)} for model, matrix in pairs],
        "parameters": dict(parameters),
        "edgemerge": {"type": "F16"},
    }
    recipe = output.with_suffix(".yml")
    recipe.write_text(yaml.safe_dump(document))
    merge(load_recipe(recipe), output, force=True)


def score(path: Path, limit: int | None) -> dict[str, Any]:
    """Score a merge on all sets of held-out questions."""
    with Model(path) as model:
        return {
            name: asdict(evaluate(model, read_questions(MODELS / "eval" / f"{name}.jsonl")[:limit]))
            for name in SETS
        }


def measure(base: Path, experts: Mapping[str, Path], limit: int | None) -> list[dict[str, Any]]:
    """Make and score every merge."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        matrices = [measure_matrix(path, domain, folder) for domain, path in experts.items()]
        for weighting, own, label in (
            ("linear", matrices, "plain weights"),
            ("agreement", matrices, "agreement"),
            ("importance", matrices, "importance"),
            ("importance", matrices[::-1], "importance, of the other expert"),
        ):
            for scale in LAMBDAS if weighting != "agreement" else (1.0,):
                parameters = {"weighting": weighting, "lambda": scale}
                merge_weighted(base, experts, own, parameters, folder / "merged.gguf")
                scores = score(folder / "merged.gguf", limit)
                found.append({"label": f"{label}, lambda {scale:g}", **scores})
    return found


def render(rows: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown table of docs/quality.md."""
    header = ["weighting", *SETS, "mean of both domains", "loss, both"]
    lines = []
    for row in rows:
        cells = [row["label"]]
        cells += [
            f"{100 * row[name]['acc']:.1f} ± {196 * row[name]['stderr']:.1f}" for name in SETS
        ]
        cells.append(f"{50 * sum(row[name]['acc'] for name in MEDICAL):.1f}")
        cells.append(f"{sum(row[name]['loss'] for name in MEDICAL) / 2:.3f}")
        lines.append(cells)
    return table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, help="questions per set")
    parser.add_argument("--base", type=Path, default=MODELS / "base")
    parser.add_argument(
        "--expert",
        type=Path,
        action="append",
        help="a model for diseases, then one for substances [default: those of tests/models]",
    )
    options = parser.parse_args()
    paths = options.expert or [MODELS / "expert-a", MODELS / "expert-b"]
    experts = dict(zip(MEDICAL, paths, strict=True))
    rows = measure(options.base, experts, options.limit)
    finish("importance", render(rows), rows)


if __name__ == "__main__":
    main()
