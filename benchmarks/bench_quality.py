"""What each method is worth: two real experts merged, scored on 1300 held-out questions by llama.cpp.

The models are those of tests/models: one base, an expert on diseases, one on substances, and the latter
with its attention heads in another order ("shuffled"). Accuracy is lm-evaluation-harness's `acc`; the
interval is 1.96 binomial standard errors.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from measure import CACHE, FIGURES, ROOT, finish
from quality_rows import VARIANTS, Row, merges, shuffled, words_of
from quality_scores import MEDICAL, Asked, Figures, Job, Scores, as_json, measure, read_options
from quality_table import render

sys.path.insert(0, str(ROOT))
from tests.support.fixtures import unpacked

MODELS = unpacked("models")
TYPES = ("F16", "Q4_K_M")
EXPERTS = ("expert-a", "expert-b")
SHUFFLED = ("expert-a", "expert-b-permuted")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options = read_options(parser, limit=None)
    asked = Asked.of(MODELS / "eval", options.limit)
    with tempfile.TemporaryDirectory() as folder:
        scores = Scores(CACHE / "quality.json", asked)
        found = measure(list(jobs(scores)), Path(folder), only_kept=options.finished)
    draw([pair for pair in found["F16"] if pair[1]], FIGURES / "quality.png")
    parts = [f"{file_type}:\n\n{render(rows, asked)}" for file_type, rows in found.items()]
    finish("quality", "\n\n".join(parts), as_json(found))


def jobs(scores: Scores) -> Iterator[Job]:
    """Yield all rows as F16, and as Q4_K_M all but those of the shuffled expert."""
    for file_type in TYPES:
        for name in ("base", *EXPERTS, SHUFFLED[1]):
            row = Row(name, "passthrough", group="models")
            yield Job(row, words_of(row, "", [str(MODELS / name)]), file_type, scores)
        more = shuffled() if file_type == "F16" else ()
        for rows, names in ((merges(*VARIANTS), EXPERTS), (more, SHUFFLED)):
            experts = [str(MODELS / name) for name in names]
            for row in rows:
                words = words_of(row, str(MODELS / "base"), experts)
                yield Job(row, words, file_type, scores)


def draw(rows: Sequence[tuple[Row, Figures]], path: Path) -> None:
    """Draw accuracy on both domains, F16, one dot a merge; shuffled beside aligned."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    colours = {"models": "#777777", "paper": "#0072b2", "ours": "#009e73"}
    colours |= {"shuffled": "#d55e00", "aligned": "#e69f00"}
    names = {"models": "the models", "paper": "the paper's settings", "ours": "our settings"}
    names |= {"shuffled": "heads shuffled", "aligned": "shuffled, then aligned"}
    figure, axes = pyplot.subplots(figsize=(9, 0.24 * len(rows) + 1.2), layout="constrained")
    for at, (row, found) in enumerate(reversed(rows)):
        both = [found["sets"][name]["score"] for name in MEDICAL]
        mean = 50 * sum(score["acc"] for score in both)
        error = 98 * sum(score["stderr"] ** 2 for score in both) ** 0.5
        colour = colours[row.group]
        axes.errorbar(mean, at, xerr=error, fmt="o", color=colour, capsize=2, markersize=5)
    axes.set_yticks(range(len(rows)), [row.label for row, _ in reversed(rows)], fontsize=8)
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


if __name__ == "__main__":
    main()
