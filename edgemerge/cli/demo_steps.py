"""What both parts of the demo do: make files, score them, print the scores."""

from __future__ import annotations

import runpy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from edgemerge.cli.terminal import check_stop, print_table
from edgemerge.errors import OutputError

if TYPE_CHECKING:
    from edgemerge.runtime.evaluation.evaluate import Score
    from edgemerge.runtime.evaluation.questions import Question
    from edgemerge.types import Recipe

__all__ = [
    "SETS",
    "make_file",
    "mean_of_both",
    "models_of_checkout",
    "output_folder",
    "print_scores",
    "score_files",
]

SETS = ("disease", "substance", "general")

Scores = Mapping[str, Mapping[str, "Score"]]  # by file and set


def models_of_checkout() -> Path:
    """Return the folder of the small models and the questions, which only the source tree has."""
    from edgemerge.errors import RecipeError

    fixtures = Path(__file__).resolve().parents[2] / "tests" / "support" / "fixtures.py"
    if not fixtures.is_file():
        raise RecipeError(
            "the demo's models are in the source tree, not in the package; run make demo in a "
            "checkout, or name their folder with --models"
        )
    unpacked = runpy.run_path(str(fixtures))["unpacked"]  # the tests' own; no part of the package
    return Path(unpacked("models"))


@contextmanager
def output_folder(kept: Path | None) -> Iterator[Path]:
    """Make the folder for merged files: the one to keep, or one that goes away at the end."""
    if kept is not None:
        try:
            kept.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"cannot be made a folder ({error.strerror}); give another name"
            raise OutputError(message, path=kept) from error
        try:
            yield kept
        except KeyboardInterrupt as error:
            error.add_note(f"what was merged stays in {kept}; --force replaces it")
            raise
        return
    with tempfile.TemporaryDirectory(prefix="edgemerge-demo-") as folder:
        yield Path(folder)


def make_file(title: str, recipe: Recipe, path: Path, *, force: bool) -> None:
    """Merge into a file and print what it took."""
    from edgemerge.merging.run import merge

    report = merge(recipe, path, force=force, progress=check_stop)
    print(
        f"{title:36s} {report.seconds:5.1f} s  {report.out_bytes / 1e6:5.1f} MB  "
        f"peak memory {report.peak_rss_bytes / 1e6:3.0f} MB"
    )


def score_files(files: Mapping[str, Path], questions: Mapping[str, Sequence[Question]]) -> Scores:
    """Score files on every set of questions; say what is asked."""
    from edgemerge.runtime.evaluation.evaluate import evaluate
    from edgemerge.runtime.llama import Model

    total = sum(map(len, questions.values()))
    each = ", ".join(f"{len(items)} {name}" for name, items in questions.items())
    print(
        f"\nPercent right of {total} questions, +- standard error\n"
        f"({each}).\n"
        "No model was trained on any of them; llama.cpp computes the answers.\n"
    )
    scores: dict[str, dict[str, Score]] = {}
    for name, path in files.items():
        with Model(path) as model:
            scores[name] = {key: evaluate(model, items) for key, items in questions.items()}
    return scores


def print_scores(scores: Scores) -> None:
    """Print a row for each file."""
    rows = [
        (
            name,
            *(f"{100 * score.acc:.1f} +- {100 * score.stderr:.1f}" for score in row.values()),
            f"{100 * mean_of_both(row):.1f}",
        )
        for name, row in scores.items()
    ]
    print_table(("model", *SETS, "both"), rows)
    print("\nChance is 25. 'both' is the mean of disease and substance.")


def mean_of_both(row: Mapping[str, Score]) -> float:
    """Return the mean accuracy on the two domains of the experts."""
    return (row["disease"].acc + row["substance"].acc) / 2
