"""`edgemerge demo`: merges real small models, scores them, shows answers of the best. Offline."""

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
N_SHOWN = 3  # questions per domain whose answers are shown


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
    """Merge two small medical experts in several ways, score them, show answers of the best."""
    from edgemerge.runtime.evaluation.questions import read_questions

    folder = models or _models_of_checkout()
    questions = {name: read_questions(folder / "eval" / f"{name}.jsonl")[:limit] for name in SETS}
    print(
        "A base model of 3.4 M parameters, an expert on diseases (which ICD-10 chapter?) and one "
        "on\nsubstances (which MeSH class?), each tuned from it. Can one model do both?\n"
    )
    with _output_folder(output) as out:
        merged = _make_files(folder, out, force=force)
        scores = _score_files(merged, questions)
        _print_scores(scores, questions)
        _show_answers(merged, scores, questions)


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
            f"{name:38s} {report.seconds:5.1f} s  {report.out_bytes / 1e6:4.1f} MB  "
            f"{report.peak_rss_bytes / 1e6:4.0f} MB of memory at peak"
        )
    return files


def _score_files(
    files: dict[str, Path], questions: dict[str, list[Question]]
) -> dict[str, dict[str, Score]]:
    from edgemerge.runtime.evaluation.evaluate import evaluate
    from edgemerge.runtime.llama import Model

    total = sum(map(len, questions.values()))
    print(f"\nScoring on {total} questions that no model was trained on, through llama.cpp:\n")
    scores: dict[str, dict[str, Score]] = {}
    for name, path in files.items():
        with Model(path) as model:
            scores[name] = {key: evaluate(model, items) for key, items in questions.items()}
    return scores


def _print_scores(
    scores: dict[str, dict[str, Score]], questions: dict[str, list[Question]]
) -> None:
    header = ("model", *(f"{name} ({len(items)})" for name, items in questions.items()), "both")
    rows = [
        (
            name,
            *(f"{100 * score.acc:.1f} % +- {100 * score.stderr:.1f}" for score in row.values()),
            f"{100 * _both(row):.1f} %",
        )
        for name, row in scores.items()
    ]
    print_table(header, rows)
    print("\nChance is 25 %. 'both' is the mean of diseases and substances.")


def _both(row: dict[str, Score]) -> float:
    return (row["disease"].acc + row["substance"].acc) / 2


def _show_answers(
    files: dict[str, Path],
    scores: dict[str, dict[str, Score]],
    questions: dict[str, list[Question]],
) -> None:
    from edgemerge.runtime.evaluation.evaluate import mark
    from edgemerge.runtime.evaluation.likelihood import option_likelihoods
    from edgemerge.runtime.llama import Model

    best = max(
        (name for name in scores if name not in ("base", *EXPERTS)), key=lambda n: _both(scores[n])
    )
    print(f"\nThe best merge is {best}. What it picks, of four options each:\n")
    with Model(files[best]) as model:
        for key in ("disease", "substance"):
            step = max(1, len(questions[key]) // N_SHOWN)
            shown = questions[key][::step][:N_SHOWN]
            for question, found in zip(shown, option_likelihoods(model, shown), strict=True):
                marked = mark(question, found)
                right = question.options[question.answer]
                verdict = "right" if marked.right else f"wrong: {right}"
                asked = question.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
                print(f"  {asked} {question.options[marked.chosen]} ({verdict})")
