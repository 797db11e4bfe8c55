"""What each method is worth: two real experts merged, scored on 1300 held-out questions by llama.cpp.

The models are those of tests/models: one base, an expert on diseases, one on substances, and the latter
with its attention heads in another order ("shuffled"). Every row is a merge with the given settings,
every type one file. Accuracy is lm-evaluation-harness's `acc`; the interval is 1.96 binomial standard
errors, loss is the mean negative log-likelihood per token of the right options, in nats.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from measure import machine, table

from edgemerge import make_recipe, merge
from edgemerge.recipe.presets import with_preset
from edgemerge.runtime.evaluation.evaluate import Score, evaluate
from edgemerge.runtime.evaluation.questions import read_questions
from edgemerge.runtime.llama import Model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.support.fixtures import unpacked

ROOT = Path(__file__).resolve().parents[1]
MODELS = unpacked("models")
FIGURE = ROOT / "benchmarks" / "figures" / "quality.png"
SETS = ("disease", "substance", "general")
TYPES = ("F16", "Q8_0", "Q4_K_M")
EXPERTS = ("expert-a", "expert-b")
SHUFFLED = ("expert-a", "expert-b-permuted")


@dataclass(frozen=True)
class Row:
    """One merge."""

    label: str
    method: str
    parameters: dict[str, Any] = field(default_factory=dict)
    preset: str | None = None
    experts: tuple[str, ...] = EXPERTS
    align: str | None = None
    group: str = "ours"  # models | paper | ours | shuffled | aligned


# Found by search_settings.py on validation questions: late layers, and the matrices that write to the
# residual stream, bear more than the sum of both changes, embeddings and the first layer less.
LATE = [0.75, 1.172, 0.759, 1.25]
BY_LAYER = [
    {"filter": "embed_tokens", "value": 0.6},
    {"filter": "norm", "value": 0.893},
    *({"filter": name, "value": LATE} for name in ("o_proj", "down_proj", "up_proj")),
    {"value": [0.6, 0.938, 0.607, 1.0]},
]
RAMP = [0.6, 1.2]
OURS = (
    Row("linear", "linear"),
    Row("slerp t=0.5", "slerp", {"t": 0.5}),
    Row("task_arithmetic lambda=0.7", "task_arithmetic", {"lambda": 0.7}),
    Row("task_arithmetic lambda=[0.6, 1.2]", "task_arithmetic", {"lambda": RAMP}),
    Row("task_arithmetic, lambda by layer and kind", "task_arithmetic", {"lambda": BY_LAYER}),
    Row("ties density=0.5", "ties", {"density": 0.5}),
    Row("dare_linear density=0.6 lambda=0.7", "dare_linear", {"density": 0.6, "lambda": 0.7}),
    Row("dare_ties density=0.6 lambda=0.7", "dare_ties", {"density": 0.6, "lambda": 0.7}),
    Row(
        "della_linear density=0.6 epsilon=0.05 lambda=0.7",
        "della_linear",
        {"density": 0.6, "epsilon": 0.05, "lambda": 0.7},
    ),
    Row(
        "della density=0.6 epsilon=0.05 lambda=0.7",
        "della",
        {"density": 0.6, "epsilon": 0.05, "lambda": 0.7},
    ),
    Row("breadcrumbs density=0.9 lambda=0.7", "breadcrumbs", {"density": 0.9, "lambda": 0.7}),
    Row("breadcrumbs_ties density=0.9", "breadcrumbs_ties", {"density": 0.9}),
    Row("lines", "lines"),
    Row("covariance", "covariance"),
    Row("covariance, all columns together", "covariance", {"columns": 0}),
    Row("covariance, 64 columns together", "covariance", {"columns": 64}),
    Row(
        "breadcrumbs density=0.9 lambda=[0.6, 1.2]", "breadcrumbs", {"density": 0.9, "lambda": RAMP}
    ),
    Row("hierarchical", "hierarchical"),
    Row("hierarchical scope=block", "hierarchical", {"scope": "block"}),
    Row("hierarchical scope=row", "hierarchical", {"scope": "row"}),
)


def rows() -> Iterator[Row]:
    """Yield the table's rows: models, the paper's settings, ours, and the shuffled expert."""
    for name in ("base", *EXPERTS, SHUFFLED[1]):
        yield Row(name, "passthrough", experts=(name,), group="models")
    paper = ("linear", "task_arithmetic", "dare_ties", "della", "breadcrumbs", "hierarchical")
    for method in paper:
        yield Row(method, method, preset="paper", group="paper")
    yield from OURS
    compared = {"linear", "task_arithmetic", "ties", "dare_ties", "della", "breadcrumbs", "slerp"}
    compared |= {"hierarchical"}
    for row in OURS:
        if row.method in compared and not any(
            mark in row.label for mark in ("by layer", "[", "scope")
        ):
            for group, align in (("shuffled", "off"), ("aligned", "hard")):
                changes = {"experts": SHUFFLED, "align": align, "group": group}
                yield Row(**{**asdict(row), **changes})


def make(row: Row, out_type: str, output: Path) -> None:
    """Merge one row of the table into a file."""
    base, models = "base", row.experts
    if row.method == "slerp":
        base, models = models[0], models[1:]
    recipe = make_recipe(
        row.method,
        [(str(MODELS / name), None) for name in models],
        base=None if row.method in ("linear", "passthrough") else str(MODELS / base),
        parameters=row.parameters,
        out_type=out_type,
        align=row.align,
    )
    merge(with_preset(recipe, row.preset) if row.preset else recipe, output, force=True)


def measure(limit: int | None) -> list[dict[str, Any]]:
    """Make and score every file."""
    questions = {name: read_questions(MODELS / "eval" / f"{name}.jsonl") for name in SETS}
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "model.gguf"
        for row in rows():
            scores: dict[str, dict[str, Score]] = {}
            for out_type in TYPES:
                make(row, out_type, output)
                with Model(output) as model:
                    scores[out_type] = {
                        name: evaluate(model, items[:limit]) for name, items in questions.items()
                    }
            figures.append(
                {
                    "group": row.group,
                    "label": row.label,
                    **{t: {n: asdict(s) for n, s in found.items()} for t, found in scores.items()},
                }
            )
    return figures


def render(figures: list[dict[str, Any]]) -> str:
    """Return the Markdown table of QUALITY.md."""
    groups = {"models": "", "paper": "paper: ", "ours": "", "shuffled": "shuffled: "}
    groups["aligned"] = "shuffled, aligned: "
    header = ["merge", "disease", "substance", "general", "loss, both", "Q8_0", "Q4_K_M"]
    lines = []
    for entry in figures:
        half = entry["F16"]
        cells = [groups[entry["group"]] + entry["label"]]
        cells += [
            f"{100 * half[name]['acc']:.1f} ± {196 * half[name]['stderr']:.1f}" for name in SETS
        ]
        cells.append(f"{(half['disease']['loss'] + half['substance']['loss']) / 2:.3f}")
        cells += [
            " / ".join(f"{100 * entry[t][name]['acc']:.1f}" for name in SETS) for t in TYPES[1:]
        ]
        lines.append(cells)
    return table(header, lines)


def draw(figures: list[dict[str, Any]], path: Path) -> None:
    """Draw accuracy on both domains, F16, one dot a merge; shuffled beside aligned."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    colours = {"models": "#777777", "paper": "#0072b2", "ours": "#009e73"}
    colours |= {"shuffled": "#d55e00", "aligned": "#e69f00"}
    names = {"models": "the models", "paper": "the paper's settings", "ours": "our settings"}
    names |= {"shuffled": "heads shuffled", "aligned": "shuffled, then aligned"}
    figure, axes = pyplot.subplots(figsize=(9, 0.24 * len(figures) + 1.2), layout="constrained")
    for at, entry in enumerate(reversed(figures)):
        both = [entry["F16"][name] for name in SETS[:2]]
        mean = 50 * sum(score["acc"] for score in both)
        error = 98 * sum(score["stderr"] ** 2 for score in both) ** 0.5
        colour = colours[entry["group"]]
        axes.errorbar(mean, at, xerr=error, fmt="o", color=colour, capsize=2, markersize=5)
    axes.set_yticks(
        range(len(figures)), [entry["label"] for entry in reversed(figures)], fontsize=8
    )
    axes.axvline(25, color="#bbbbbb", linestyle=":", linewidth=1)
    axes.set_xlabel("percent right, mean of diseases and substances (95 % interval; chance is 25)")
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles = [
        Line2D([], [], color=colour, marker="o", linestyle="", label=names[group])
        for group, colour in colours.items()
    ]
    axes.legend(handles=handles, loc="upper right", fontsize=8, frameon=True)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, help="questions per set")
    options = parser.parse_args()
    figures = measure(options.limit)
    draw(figures, FIGURE)
    print(render(figures))
    print(json.dumps({"bench": "quality", "machine": machine(), "rows": figures}))


if __name__ == "__main__":
    main()
