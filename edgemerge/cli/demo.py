"""`edgemerge demo`: merges real small models, scores them, shows their answers. Offline."""

from __future__ import annotations

import re
import runpy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from edgemerge.cli import request
from edgemerge.cli.demo_answers import print_answers
from edgemerge.cli.terminal import check_stop, print_table, speaks_plainly

if TYPE_CHECKING:
    from edgemerge.runtime.evaluation.evaluate import Score
    from edgemerge.runtime.evaluation.questions import Question

__all__ = ["demo_command"]

EXPERTS = ("expert-a", "expert-b")
SHUFFLED = (
    "expert-a",
    "expert-b-permuted",
)  # the same expert b, its attention heads in another order


class Trial(NamedTuple):
    """One merge of the demo, as a user would say it."""

    label: str
    method: str
    parameters: dict[str, Any]
    file_type: str = "F16"
    experts: tuple[str, ...] = EXPERTS
    align: str | None = None


TRIALS = (
    Trial("linear", "linear", {}),
    Trial("slerp, t 0.5", "slerp", {"t": 0.5}),
    Trial("task_arithmetic, lambda 0.7", "task_arithmetic", {"lambda": 0.7}),
    Trial("task_arithmetic, lambda 0.7", "task_arithmetic", {"lambda": 0.7}, "Q8_0"),
    Trial("task_arithmetic, lambda 0.7", "task_arithmetic", {"lambda": 0.7}, "Q4_K_M"),
    Trial("ties, density 0.5", "ties", {"density": 0.5}),
    Trial("dare_ties, density 0.6", "dare_ties", {"density": 0.6}),
    Trial("della, density 0.6", "della", {"density": 0.6, "epsilon": 0.05}),
    Trial("breadcrumbs, density 0.9", "breadcrumbs", {"density": 0.9, "lambda": 0.7}),
    Trial("hierarchical", "hierarchical", {}),
    Trial("linear, b's heads shuffled", "linear", {}, experts=SHUFFLED),
    Trial("the same, aligned", "linear", {}, experts=SHUFFLED, align="hard"),
)
SETS = ("disease", "substance", "general")


@speaks_plainly
def demo_command(
    models: Annotated[
        Path | None,
        typer.Option(
            help="Folder with base, expert-a, expert-b and eval [default: of this checkout]."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder to keep the merged files in [default: none]."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Questions per set [default: all].")
    ] = None,
    force: request.Force = False,
) -> None:
    """Merge two small medical experts in several ways, score them, compare their answers."""
    from edgemerge.runtime.evaluation.questions import read_questions

    folder = models or _models_of_checkout()
    questions = {name: read_questions(folder / "eval" / f"{name}.jsonl")[:limit] for name in SETS}
    print(
        "A base model of 3.4 M parameters. Expert a was tuned from it on diseases (which\n"
        "ICD-10 chapter?), expert b on substances (which MeSH class?).\n"
        "Can one model do both?\n"
    )
    with _output_folder(output) as out:
        merged = _make_files(folder, out, force=force)
        scores = _score_files(merged, questions)
        _print_scores(scores, questions)
        best = _best(scores)
        print(f"\nThe best of these merges is {best}.\nDid two experts become one?\n")
        shown = {"base": "base", "expert a": EXPERTS[0], "expert b": EXPERTS[1], "merge": best}
        print_answers({title: merged[name] for title, name in shown.items()}, folder / "eval")


def _models_of_checkout() -> Path:
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
def _output_folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="edgemerge-demo-") as folder:
        yield Path(folder)


def _make_files(folder: Path, out: Path, *, force: bool) -> dict[str, Path]:
    """Convert the three models and make all merges; say what is done."""
    from edgemerge.merging.run import merge
    from edgemerge.recipe.recipe import make_recipe

    files: dict[str, Path] = {}
    for name in ("base", *EXPERTS):
        files[name] = out / f"{name}.gguf"
        merge(
            make_recipe("passthrough", [(str(folder / name), None)]),
            files[name],
            force=force,
            progress=check_stop,
        )
    for trial in TRIALS:
        base, experts = "base", trial.experts
        if trial.method == "slerp":  # between the two experts, the first of them standing for t = 0
            base, experts = EXPERTS[0], EXPERTS[1:]
        recipe = make_recipe(
            trial.method,
            [(str(folder / name), None) for name in experts],
            base=str(folder / base) if trial.method != "linear" else None,
            parameters=trial.parameters,
            out_type=trial.file_type,
            align=trial.align,
        )
        name = f"{trial.label}, {trial.file_type}"
        files[name] = out / f"{re.sub('[^a-z0-9._]+', '-', name.lower())}.gguf"
        report = merge(recipe, files[name], force=force, progress=check_stop)
        print(
            f"{name:36s} {report.seconds:5.1f} s  {report.out_bytes / 1e6:4.1f} MB  "
            f"peak memory {report.peak_rss_bytes / 1e6:3.0f} MB"
        )
    return files


def _score_files(
    files: dict[str, Path], questions: dict[str, list[Question]]
) -> dict[str, dict[str, Score]]:
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


def _print_scores(
    scores: dict[str, dict[str, Score]], questions: dict[str, list[Question]]
) -> None:
    header = ("model", *questions, "both")
    rows = [
        (
            name,
            *(f"{100 * score.acc:.1f} +- {100 * score.stderr:.1f}" for score in row.values()),
            f"{100 * _both(row):.1f}",
        )
        for name, row in scores.items()
    ]
    print_table(header, rows)
    print("\nChance is 25. 'both' is the mean of disease and substance.")


def _both(row: dict[str, Score]) -> float:
    return (row["disease"].acc + row["substance"].acc) / 2


def _best(scores: dict[str, dict[str, Score]]) -> str:
    merges = [name for name in scores if name not in ("base", *EXPERTS)]
    return max(merges, key=lambda name: _both(scores[name]))
