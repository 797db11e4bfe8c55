"""The demo with the small models of a checkout: offline, in a minute."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from edgemerge.cli.demo_answers import print_answers
from edgemerge.cli.demo_steps import (
    SETS,
    Scores,
    make_file,
    mean_of_both,
    models_of_checkout,
    output_folder,
    print_scores,
    score_files,
)
from edgemerge.cli.terminal import check_stop

__all__ = ["show_tiny"]

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


def show_tiny(models: Path | None, output: Path | None, limit: int | None, *, force: bool) -> None:
    """Merge two small medical experts in several ways, score them, compare their answers."""
    from edgemerge.runtime.evaluation.questions import read_questions

    folder = models or models_of_checkout()
    questions = {name: read_questions(folder / "eval" / f"{name}.jsonl")[:limit] for name in SETS}
    print(
        "A base model of 3.4 M parameters. Expert a was tuned from it on diseases (which\n"
        "ICD-10 chapter?), expert b on substances (which MeSH class?).\n"
        "Can one model do both?\n"
    )
    with output_folder(output) as out:
        merged = _make_files(folder, out, force=force)
        scores = score_files(merged, questions)
        print_scores(scores)
        best = _best(scores)
        print(f"\nThe best of these merges is {best}.\nDid two experts become one?\n")
        shown = {"base": "base", "expert a": EXPERTS[0], "expert b": EXPERTS[1], "merge": best}
        print_answers({title: merged[name] for title, name in shown.items()}, folder / "eval")


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
        make_file(name, recipe, files[name], force=force)
    return files


def _best(scores: Scores) -> str:
    merges = [name for name in scores if name not in ("base", *EXPERTS)]
    return max(merges, key=lambda name: mean_of_both(scores[name]))
