"""What a merged model and its inputs say to a few questions, side by side."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from edgemerge.cli.terminal import plain

if TYPE_CHECKING:
    from edgemerge.runtime.smoke import Answer
    from edgemerge.types import Recipe

__all__ = ["ask_models"]

SHOWN = 60  # characters of an answer


def ask_models(recipe: Recipe, output: Path, questions: Sequence[str] | None) -> None:
    """Print the first words of the inputs and of the result; warn of loops.

    Only GGUF files can be asked, and only those that fit into the memory that is free.
    """
    if find_spec("llama_cpp") is None:
        if questions:
            _note("nothing was asked: that needs pip install 'edgemerge[run]'")
        return
    from edgemerge.runtime.smoke import QUESTIONS, ask_aside

    given = [path for path in recipe.models() if path.is_absolute()]  # not a stage's, which is gone
    models = [path for path in (*given, output) if _can_be_asked(path)]
    asked = tuple(questions or QUESTIONS)
    try:
        answers = ask_aside(models, asked)
    except KeyboardInterrupt:
        _note("the questions were broken off; the merge is done, --no-ask leaves them out")
        return
    width = max((len(path.name) for path in models), default=0)
    for question in asked:
        print(f"\n{plain(question)}")
        for answer in answers:
            if answer.question == question:
                print(f"  {plain(Path(answer.model).name).ljust(width)}  {_first_words(answer)}")
    looped = {Path(answer.model).name for answer in answers if answer.loops}
    if output.name in looped:
        _note(
            f"{output.name} repeats itself; smaller weights, a smaller lambda or another method "
            "may mend that"
        )


def _can_be_asked(path: Path) -> bool:
    from edgemerge.formats.gguf.split import sibling_parts
    from edgemerge.remote.stand_ins import is_remote
    from edgemerge.runtime.board.memory import read_memory

    if not path.is_file() or is_remote(path):
        return False
    size = sum(part.stat().st_size for part in sibling_parts(path) if part.is_file())
    return size < read_memory().available


def _first_words(answer: Answer) -> str:
    if answer.problem is not None:
        return f"({plain(answer.problem)})"
    text = " ".join(plain(answer.text).split())
    if len(text) > SHOWN:
        text = f"{text[:SHOWN].rpartition(' ')[0] or text[:SHOWN]} ..."
    return (text or "(nothing)") + (" (repeats itself)" if answer.loops else "")


def _note(sentence: str) -> None:
    print(f"note: {sentence}", file=sys.stderr)
