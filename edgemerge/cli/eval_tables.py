"""What `edgemerge eval` prints: models side by side, or comma-separated values."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemerge.cli.terminal import plain, print_table

if TYPE_CHECKING:
    from edgemerge.runtime.evaluation.suite import Answered, TextScore

__all__ = ["print_csv", "print_tables"]


def print_tables(
    models: Sequence[Path], answers: Sequence[Answered], texts: Sequence[TextScore]
) -> None:
    """Print a row per metric and a column per model, then each model's difference from the first."""
    names = _short_names(models)
    rows = [*_score_rows(models, answers), *_mean_rows(models, answers)]
    rows += [
        (
            text.name,
            f"{reads[0].perplexity.n_tokens} tokens",
            "perplexity",
            *(f"{one.perplexity.value:.4f} ± {one.perplexity.stderr:.4f}" for one in reads),
        )
        for text, reads in _by_text(texts).items()
    ]
    header = ("task", "of", "metric", *names.values())
    print_table(header, rows, right=" ".join(("of", *names.values())))
    if answers:
        has_errors = any("±" in cell for row in rows for cell in row)
        error = "± is one standard error; " if has_errors else ""
        print(f"{error}by chance {_chances(models, answers)}")
    if differences := list(_difference_rows(answers, names)):
        print()
        print_table(
            ("task", "model", f"acc minus {names[models[0]]}'s", "p (McNemar)"), differences
        )


def _short_names(models: Sequence[Path]) -> dict[Path, str]:
    """Names of files, or whole paths where those are alike."""
    stems = [path.stem for path in models]
    return {path: plain(path.stem if stems.count(path.stem) == 1 else str(path)) for path in models}


def _score_rows(models: Sequence[Path], answers: Sequence[Answered]) -> Iterator[tuple[str, ...]]:
    for start in range(0, len(answers), len(models)):
        row = answers[start : start + len(models)]
        task = row[0].task
        n, n_total = len(task.questions), task.n_total
        of = f"{n} questions" if n == n_total else f"{n} of {n_total} questions"
        shots = f", {task.n_shots} shots" if task.n_shots else ""
        yield (
            f"{task.name}{shots}",
            of,
            "acc",
            *(_percent(one.score.acc, one.score.stderr) for one in row),
        )
        if any(len(set(map(len, question.options))) > 1 for question in task.questions):
            # options of one length, such as letters, have the same acc_norm as acc
            norms = (_percent(one.score.acc_norm, one.score.stderr_norm) for one in row)
            yield ("", "", "acc_norm", *norms)


def _mean_rows(models: Sequence[Path], answers: Sequence[Answered]) -> Iterator[tuple[str, ...]]:
    """Average the tasks of each model, each task alike; errors add up as those of independent tasks."""
    n_tasks = len(answers) // len(models)
    if n_tasks < 2:
        return
    means = []
    for i in range(len(models)):
        scores = [one.score for one in answers[i :: len(models)]]
        error = math.sqrt(sum(score.stderr**2 for score in scores)) / n_tasks
        means.append(_percent(sum(score.acc for score in scores) / n_tasks, error))
    yield (f"mean of {n_tasks} tasks", "", "acc", *means)


def _chances(models: Sequence[Path], answers: Sequence[Answered]) -> str:
    """Say what guessing gives: one figure, or one for each task where they differ."""
    chances = {}
    for one in answers[:: len(models)]:
        shares = [1 / len(question.options) for question in one.task.questions]
        chances[one.task.name] = f"{100 * sum(shares) / len(shares):.1f} %"
    if len(set(chances.values())) == 1:
        return next(iter(chances.values()))
    return ", ".join(f"{chance} ({name})" for name, chance in chances.items())


def _percent(share: float, stderr: float) -> str:
    error = f" ± {100 * stderr:.1f}" if math.isfinite(stderr) else ""
    return f"{100 * share:.1f} %{error}"


def _by_text(texts: Sequence[TextScore]) -> dict[Path, list[TextScore]]:
    found: dict[Path, list[TextScore]] = {}
    for one in texts:
        found.setdefault(one.text, []).append(one)
    return found


def _difference_rows(
    answers: Sequence[Answered], names: Mapping[Path, str]
) -> Iterator[tuple[str, ...]]:
    from edgemerge.runtime.evaluation.evaluate import compare
    from edgemerge.runtime.evaluation.suite import pairs

    for first, second in pairs(answers):
        found = compare(first.marks, second.marks)
        yield (
            second.task.name,
            names[second.model],
            f"{100 * found.difference:+.1f} % (+{found.only_second} -{found.only_first} questions)",
            f"{found.p:.3f}" if found.p >= 0.0005 else "< 0.001",
        )


def print_csv(found: Mapping[str, Any]) -> None:
    """Print a line per model, task and metric."""
    lines = csv.writer(sys.stdout, lineterminator="\n")
    lines.writerow(("model", "task", "metric", "value", "stderr", "n"))
    for one in found["results"]:
        for metric in ("acc", "acc_norm"):
            error = one[f"{metric}_stderr"]
            lines.writerow((one["model"], one["task"], metric, one[metric], error, one["n"]))
        lines.writerow((one["model"], one["task"], "loss", one["loss"], None, one["n"]))
    for one in found["perplexity"]:
        value, error = one["perplexity"], one["stderr"]
        lines.writerow((one["model"], one["text"], "perplexity", value, error, one["n_tokens"]))
