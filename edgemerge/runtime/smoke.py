"""Asks a merged model, and what it was made of, a few questions, to see that it still talks.

Multiple-choice scores can rise while free text breaks, so a user should see some of it. The models are
asked in a process of their own, `python -m edgemerge.runtime.smoke`: what they take is not part of a merge's
budget, and a crash of llama.cpp costs an answer, not the command.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from edgemerge.errors import EdgemergeError, RuntimeFailure
from edgemerge.runtime.child_end import describe_end, is_crash

__all__ = ["MAX_TOKENS", "QUESTIONS", "Answer", "ask_aside"]

QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Name three colours.",
)
MAX_TOKENS = 96  # enough to notice a loop
CONTEXT = 1024
SECONDS = 20.0  # for one model; what it has said by then counts
START_SECONDS = 300.0  # to load one from a slow card


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said to a question.

    Attributes
    ----------
    model, question : str
        File and text.
    text : str
        Its answer at temperature 0, cut off after `MAX_TOKENS` tokens or `SECONDS`.
    loops : bool
        Whether it repeated itself.
    problem : str or None
        Why there is no answer.
    blames_model : bool
        Whether that is the model's own problem; else its process was ended or took too long, or llama.cpp
        failed, as where memory is short.
    speed : float or None
        Tokens per second after the first; None where there was only one.
    """

    model: str
    question: str
    text: str = ""
    loops: bool = False
    problem: str | None = None
    blames_model: bool = True
    speed: float | None = None


def ask_aside(
    models: Sequence[Path], questions: Sequence[str], n_threads: int | None = None
) -> list[Answer]:
    """Ask each model each question, in a child process per model.

    What goes wrong, be it a crash, is the answer's `problem`; nothing is raised.

    Parameters
    ----------
    models : sequence of Path
        GGUF files.
    questions : sequence of str
        Texts.
    n_threads : int, optional
        Threads that compute; by default as many as are fastest.
    """
    answers = []
    for model in models:
        answers += _ask_child(model, questions, n_threads)
    return answers


def _ask_child(model: Path, questions: Sequence[str], n_threads: int | None) -> list[Answer]:
    command = [sys.executable, "-P", "-m", "edgemerge.runtime.smoke"]
    asked = json.dumps({"model": str(model), "questions": list(questions), "threads": n_threads})
    blames_model = False
    try:
        result = subprocess.run(
            command,
            input=asked,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=START_SECONDS + SECONDS,
            check=False,
        )
        if result.returncode == 0:
            return [Answer(**entry) for entry in json.loads(result.stdout)]
        blames_model = is_crash(result.returncode)
        ended = f"its process {describe_end(result.returncode)}"
        problem = "llama.cpp crashed" if blames_model else ended
    except subprocess.TimeoutExpired:
        problem = "loading took too long"
    except (OSError, ValueError, TypeError):
        problem = "it could not be asked"
    return [
        Answer(str(model), question, problem=problem, blames_model=blames_model)
        for question in questions
    ]


def _main() -> None:
    """Answer what stands on standard input, as JSON on standard output."""
    asked = json.load(sys.stdin)
    answers = _ask(Path(asked["model"]), asked["questions"], asked["threads"])
    json.dump([asdict(answer) for answer in answers], sys.stdout)


def _ask(path: Path, questions: Sequence[str], n_threads: int | None) -> list[Answer]:
    from edgemerge.runtime.engine.messages import Sampling
    from edgemerge.runtime.generate import End, Session, read_prompt
    from edgemerge.runtime.llama import Model
    from edgemerge.runtime.model_files import open_gguf
    from edgemerge.runtime.template import load_template

    answers, is_loaded = [], False
    try:
        open_gguf(path).close()
        with Model(path, n_threads=n_threads) as model:
            end = time.monotonic() + SECONDS
            with Session(model, min(CONTEXT, model.n_ctx_train), Sampling(temperature=0.0)) as talk:
                is_loaded = True
                template = load_template(model)
                for question in questions:
                    text = question
                    if template is not None:
                        text = template.render([{"role": "user", "content": question}])
                    said = ""
                    for piece in talk.generate(read_prompt(model, text), MAX_TOKENS):
                        said += piece
                        if time.monotonic() > end:
                            break
                    loops = talk.figures.end is End.LOOP
                    speed = talk.figures.rate
                    answers.append(Answer(str(path), question, said, loops, speed=speed))
    except EdgemergeError as error:
        left = questions[len(answers) :]
        blames_model = is_loaded or not isinstance(error, RuntimeFailure)  # memory may be short
        answers += [
            Answer(str(path), question, problem=str(error), blames_model=blames_model)
            for question in left
        ]
    return answers


if __name__ == "__main__":
    _main()
