"""What is asked of models: options of the commands that score, and the tasks that they name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from edgemerge.runtime.evaluation.tasks import Task

__all__ = ["Context", "HelpTasks", "Tasks", "Texts", "read_tasks", "refuse_twins"]
__all__ += ["require_questions"]

DEFAULT_SHOTS = 5  # of MMLU


def _print_files(wanted: bool) -> None:
    if wanted:
        from edgemerge.runtime.evaluation.questions import FILES

        typer.echo(FILES, nl=False)
        raise typer.Exit


Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        metavar="NAME=FILE",
        help="medqa, medmcqa, pubmedqa or mmlu, and its file; or any name and a FILE.jsonl of "
        "questions. May be repeated.",
    ),
]
Texts = Annotated[
    list[Path] | None,
    typer.Option(
        "--perplexity",
        metavar="TEXT",
        help="A text file to measure perplexity on; may be repeated.",
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        "-c",
        "--ctx",
        min=8,
        metavar="N",
        help="Tokens of context [default: the model's own; for --perplexity 512].",
    ),
]
HelpTasks = Annotated[
    bool,
    typer.Option(
        "--help-tasks",
        callback=_print_files,
        is_eager=True,
        help="Describe the files of --task and exit.",
    ),
]


def require_questions(task: Sequence[str] | None, perplexity: Sequence[Path] | None) -> None:
    """Refuse to score nothing.

    Raises
    ------
    typer.BadParameter
        There is neither a task nor a text.
    """
    if not task and not perplexity:
        raise typer.BadParameter("give something to score with --task or --perplexity")


def refuse_twins(what: str, given: Sequence[object]) -> None:
    """Refuse what is given twice.

    Raises
    ------
    typer.BadParameter
        Something is (exit code 2).
    """
    if len(set(given)) < len(given):
        raise typer.BadParameter(f"one {what} is given twice")


def read_tasks(
    texts: Sequence[str], shots: int | None, fewshot: Sequence[Path], limit: int | None, seed: int
) -> tuple[Task, ...]:
    """Read the tasks that --task names, with their worked examples.

    Raises
    ------
    typer.BadParameter
        The options contradict each other (exit code 2).
    FormatError
        A file is not of its format.
    """
    from edgemerge.formats.files import real_path
    from edgemerge.runtime.evaluation.tasks import read_task

    named = [_name_and_file(text) for text in texts]
    refuse_twins("--task", named)
    if shots is not None and not fewshot:
        raise typer.BadParameter("--shots takes its examples from a file: name it with --fewshot")
    if len(fewshot) > 1 and len(fewshot) != len(named):
        raise typer.BadParameter(
            f"there are {len(named)} tasks and {len(fewshot)} files of --fewshot: give one for all, or "
            "one for each in order"
        )
    examples: Sequence[Path | None] = fewshot or [None]
    if len(examples) == 1:
        examples = [examples[0]] * len(named)
    n_shots = (shots or DEFAULT_SHOTS) if fewshot else 0
    tasks = []
    for (name, path), file in zip(named, examples, strict=True):
        if file is not None and real_path(file) == real_path(path):
            raise typer.BadParameter(f"--fewshot {file}: its questions are the ones to be asked")
        tasks.append(read_task(name, path, shots=n_shots, examples=file, limit=limit, seed=seed))
        if [task.name for task in tasks].count(tasks[-1].name) > 1:
            raise typer.BadParameter(
                f"two tasks are called {tasks[-1].name}: give one another name, as in --task "
                "OTHER=FILE.jsonl, or score it by itself"
            )
    return tuple(tasks)


def _name_and_file(text: str) -> tuple[str, Path]:
    from edgemerge.runtime.evaluation.questions import FORMATS

    if text.endswith(".jsonl") and ("=" not in text or Path(text).exists()):
        return "questions", Path(text)
    name, equals, file = text.partition("=")
    if equals and Path(file).is_dir():
        raise typer.BadParameter(f"--task {text!r}: {file} is a folder; give a file of questions")
    if not equals or not name or not (name in FORMATS or file.endswith(".jsonl")):
        raise typer.BadParameter(
            f"--task {text!r}: give NAME=FILE with one of {', '.join(FORMATS)} (--help-tasks says "
            "which files), or any NAME=FILE.jsonl of questions"
        )
    return name, Path(file)
