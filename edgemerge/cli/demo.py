"""`edgemerge demo`: merges real small models, scores them, and lets the best one speak. Offline."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgemerge.cli.terminal import check_stop, print_table, speaks_plainly

if TYPE_CHECKING:
    from edgemerge.runtime.evaluate import Question, Score

__all__ = ["demo_command"]

EXPERTS = ("expert-a", "expert-b")
# What is merged, as a user would say it: label, method, parameters, file type.
MERGES: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    ("linear", "linear", {}, "F16"),
    ("slerp, t 0.5", "slerp", {"t": 0.5}, "F16"),
    ("task_arithmetic, lambda 0.7", "task_arithmetic", {"lambda": 0.7}, "F16"),
    ("task_arithmetic, lambda 0.7", "task_arithmetic", {"lambda": 0.7}, "Q8_0"),
    ("task_arithmetic, lambda 0.7", "task_arithmetic", {"lambda": 0.7}, "Q4_K_M"),
    ("ties, density 0.5", "ties", {"density": 0.5}, "F16"),
    ("dare_ties, density 0.6", "dare_ties", {"density": 0.6}, "F16"),
    ("della, density 0.6", "della", {"density": 0.6, "epsilon": 0.05}, "F16"),
    ("breadcrumbs, density 0.9", "breadcrumbs", {"density": 0.9, "lambda": 0.7}, "F16"),
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
) -> None:
    """Merge two small medical experts in several ways, score them, talk to the best."""
    from edgemerge.runtime.evaluate import read_questions

    folder = models or _models_of_checkout()
    questions = {name: read_questions(folder / "eval" / f"{name}.jsonl")[:limit] for name in SETS}
    print(
        "A base model of 3.4 M parameters, an expert on diseases (which ICD-10 chapter?) and one "
        "on\nsubstances (which MeSH class?), each tuned from it. Can one model do both?\n"
    )
    with _output_folder(output) as out:
        merged = _make_files(folder, out)
        scores = _score_files(merged, questions)
        _print_scores(scores, questions)
        _speak(merged, scores, questions)


def _models_of_checkout() -> Path:
    from edgemerge.errors import RecipeError

    folder = Path(__file__).resolve().parents[2] / "tests" / "models"
    if not folder.is_dir():
        raise RecipeError(
            "the demo's models are in the source tree, not in the package; run make demo in a "
            "checkout, or name their folder with --models"
        )
    return folder


@contextmanager
def _output_folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="edgemerge-demo-") as folder:
        yield Path(folder)


def _make_files(folder: Path, out: Path) -> dict[str, Path]:
    """Convert the three models and make all merges; say what is done."""
    from edgemerge.merge import merge
    from edgemerge.recipe import make_recipe

    files: dict[str, Path] = {}
    for name in ("base", *EXPERTS):
        files[name] = out / f"{name}.gguf"
        merge(
            make_recipe("passthrough", [(str(folder / name), None)]),
            files[name],
            force=True,
            progress=check_stop,
        )
    for label, method, parameters, file_type in MERGES:
        experts: tuple[str, ...] = EXPERTS
        base = folder / "base"
        if method == "slerp":  # between the two experts, the first of them standing for t = 0
            base, experts = folder / EXPERTS[0], EXPERTS[1:]
        recipe = make_recipe(
            method,
            [(str(folder / name), None) for name in experts],
            base=str(base) if method != "linear" else None,
            parameters=parameters,
            out_type=file_type,
        )
        name = f"{label}, {file_type}"
        files[name] = out / f"{name.replace(', ', '-').replace(' ', '-')}.gguf"
        report = merge(recipe, files[name], force=True, progress=check_stop)
        print(
            f"{name:38s} {report.seconds:5.1f} s  {report.out_bytes / 1e6:4.1f} MB  "
            f"{report.peak_rss_bytes / 1e6:4.0f} MB of memory at peak"
        )
    return files


def _score_files(
    files: dict[str, Path], questions: dict[str, list[Question]]
) -> dict[str, dict[str, Score]]:
    from edgemerge.runtime.evaluate import evaluate
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


def _speak(
    files: dict[str, Path],
    scores: dict[str, dict[str, Score]],
    questions: dict[str, list[Question]],
) -> None:
    from edgemerge.runtime.generate import complete
    from edgemerge.runtime.llama import Model

    best = max(
        (name for name in scores if name not in ("base", *EXPERTS)), key=lambda n: _both(scores[n])
    )
    print(f"\nThe best merge is {best}. It goes on by itself:\n")
    with Model(files[best]) as model:
        for key in ("disease", "substance"):
            question = questions[key][0]
            text = "".join(complete(model, question.prompt, 12))
            print(
                f"  {question.prompt.replace(chr(10), ' ')}{text.splitlines()[0] if text else ''}"
            )
            print(f"    (right: {question.options[question.answer]})")
