"""Score a model on multiple-choice questions, as lm-evaluation-harness does.

The prompt is "Question: ...", a new line and "Answer:"; an option's score is the log-likelihood of
its tokens after that. The options of a question share their prompt: it is computed once, as tokens
that belong to one sequence per option, and many questions go into one batch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np

from edgemerge.errors import FormatError, RuntimeFailure
from edgemerge.runtime.llama import Context, Model
from edgemerge.types import Float32

__all__ = ["Likelihoods", "Question", "Score", "evaluate", "option_likelihoods", "read_questions"]

# Limits of one batch, unless a single question needs more. 256 tokens were the fastest of 64 to
# 512: all sequences of a batch are in one memory, so attention's cost grows with the square. 256
# sequences is llama.cpp's limit.
_TOKENS, _SEQUENCES = 256, 256


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its options, and the index of the right one."""

    question: str
    options: tuple[str, ...]
    answer: int

    @property
    def prompt(self) -> str:
        """What the model reads before an option."""
        return f"Question: {self.question}\nAnswer:"


@dataclass(frozen=True, slots=True)
class Likelihoods:
    """Log-likelihood (natural logarithm) and number of tokens of each option of a question."""

    totals: tuple[float, ...]
    n_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """How a model did on a set of questions.

    Attributes
    ----------
    acc : float
        Share of questions whose right option has the highest log-likelihood.
    acc_norm : float
        The same with each log-likelihood divided by the option's length in characters.
    loss : float
        Mean negative log-likelihood per token of the right options, in nats.
    n : int
        Number of questions.
    stderr : float
        Standard error of `acc`; 0 for a single question.
    """

    acc: float
    acc_norm: float
    loss: float
    n: int
    stderr: float


@dataclass(frozen=True, slots=True)
class _Group:
    """Options of one question that share a prompt, as tokens."""

    question: int
    prompt: list[int]
    options: list[int]  # which options these are
    endings: list[list[int]]

    @property
    def n_outputs(self) -> int:
        """Rows of logits: one after the prompt, one after each token of an ending but its last."""
        return 1 + sum(len(ending) - 1 for ending in self.endings)

    @property
    def n_tokens(self) -> int:
        """Tokens to run: the prompt's and the endings', whose last predicts nothing."""
        return len(self.prompt) - 1 + self.n_outputs


def read_questions(path: str | PathLike[str]) -> list[Question]:
    """Read questions from a JSON-lines file.

    Parameters
    ----------
    path : str or path
        Each line is an object with `question` (text), `options` (two or more texts) and `answer`
        (the index of the right option, from 0). Other keys are ignored.

    Raises
    ------
    FormatError
        A line is not such an object; the message names it. Or the file has no questions.
    """
    path = Path(path)
    questions = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    questions.append(_parse(line, path, number))
    except UnicodeDecodeError as error:
        raise FormatError(f"not UTF-8 text ({error.reason})", path=path) from error
    if not questions:
        raise FormatError("there are no questions in it", path=path)
    return questions


def _parse(line: str, path: Path, number: int) -> Question:
    def wrong(what: str) -> FormatError:
        return FormatError(f"line {number}: {what}", path=path)

    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise wrong(f"not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(item, dict):
        raise wrong("expected an object with question, options and answer")
    question, options, answer = (item.get(key) for key in ("question", "options", "answer"))
    if not isinstance(question, str):
        raise wrong("'question' must be a text")
    if not isinstance(options, list) or len(options) < 2:
        raise wrong("'options' must be a list of two or more texts")
    if not all(isinstance(option, str) and option.strip() for option in options):
        raise wrong("'options' must be texts that are not empty")
    if type(answer) is not int or not 0 <= answer < len(options):
        raise wrong(f"'answer' must be the index of an option, 0 to {len(options) - 1}")
    return Question(question, tuple(options), answer)


def evaluate(model: Model, questions: Sequence[Question]) -> Score:
    """Score a model on questions.

    Parameters
    ----------
    model : Model
        A loaded model.
    questions : sequence of Question
        At least one.
    """
    n = len(questions)
    right = right_norm = n_tokens = 0
    loss = 0.0
    for question, scored in zip(questions, option_likelihoods(model, questions), strict=True):
        lengths = [len(option) for option in question.options]
        right += int(np.argmax(scored.totals)) == question.answer
        right_norm += int(np.argmax(np.divide(scored.totals, lengths))) == question.answer
        loss -= scored.totals[question.answer]
        n_tokens += scored.n_tokens[question.answer]
    acc = right / n
    # of the mean of n zeros and ones, with the sample variance
    stderr = math.sqrt(acc * (1.0 - acc) / (n - 1)) if n > 1 else 0.0
    return Score(acc, right_norm / n, loss / n_tokens, n, stderr)


def option_likelihoods(model: Model, questions: Sequence[Question]) -> list[Likelihoods]:
    """Log-likelihood of every option of every question.

    Parameters
    ----------
    model : Model
        A loaded model.
    questions : sequence of Question
        Prompts longer than the model's context lose their beginning.
    """
    groups = [group for i, item in enumerate(questions) for group in _split(model, i, item)]
    totals = [[0.0] * len(item.options) for item in questions]
    counts = [[0] * len(item.options) for item in questions]
    n_batch = max([_TOKENS, *(group.n_tokens for group in groups)])
    batches = list(_batches(groups))
    n_outputs = max(sum(group.n_outputs for group in batch) for batch in batches)
    with model.context(
        n_batch, n_batch=n_batch, n_sequences=_SEQUENCES, n_outputs=n_outputs, exact=True
    ) as context:
        for batch in batches:
            context.clear()
            for group, values in zip(batch, _run(context, batch), strict=True):
                for option, ending, value in zip(group.options, group.endings, values, strict=True):
                    totals[group.question][option] = value
                    counts[group.question][option] = len(ending)
    return [Likelihoods(tuple(t), tuple(c)) for t, c in zip(totals, counts, strict=True)]


def _split(model: Model, index: int, question: Question) -> list[_Group]:
    """Tokens of a question: one group, or one per option where the context is too short."""
    prompt = model.tokenize(question.prompt)
    # The continuation is what the whole text has beyond the prompt's tokens: tokenised by itself,
    # an option could come out differently.
    endings = [
        model.tokenize(f"{question.prompt} {option}")[len(prompt) :] for option in question.options
    ]
    if not all(endings):
        raise RuntimeFailure(
            f"question {index + 1}: an option adds no token to {question.prompt!r}"
        )
    if max(map(len, endings)) > model.n_ctx_train:
        raise RuntimeFailure(f"question {index + 1}: an option exceeds the context of {model.path}")
    prompt = model.bos + prompt
    # lm-evaluation-harness cuts each sequence from the left, by itself; the last token is no input
    rooms = [model.n_ctx_train - len(ending) + 1 for ending in endings]
    if len(prompt) <= min(rooms):
        return [_Group(index, prompt, list(range(len(endings))), endings)]
    return [
        _Group(index, prompt[-room:], [i], [ending])
        for i, (room, ending) in enumerate(zip(rooms, endings, strict=True))
    ]


def _batches(groups: Sequence[_Group]) -> Iterator[list[_Group]]:
    """Cut the groups, in order, into batches within the limits."""
    batch: list[_Group] = []
    tokens = sequences = 0
    for group in groups:
        tokens += group.n_tokens
        sequences += len(group.endings)
        if batch and (tokens > _TOKENS or sequences > _SEQUENCES):
            yield batch
            batch, tokens, sequences = [], group.n_tokens, len(group.endings)
        batch.append(group)
    if batch:
        yield batch


def _run(context: Context, batch: Sequence[_Group]) -> list[list[float]]:
    """Log-likelihood of each ending of each group, from one decode."""
    tokens: list[int] = []
    positions: list[int] = []
    sequences: list[tuple[int, ...]] = []
    wanted: list[bool] = []
    n_sequences = 0
    for group in batch:
        shared = tuple(range(n_sequences, n_sequences + len(group.endings)))
        n_sequences += len(shared)
        tokens += group.prompt
        positions += range(len(group.prompt))
        sequences += [shared] * len(group.prompt)
        wanted += [False] * (len(group.prompt) - 1) + [True]
        for sequence, ending in zip(shared, group.endings, strict=True):
            inputs = ending[:-1]
            tokens += inputs
            positions += range(len(group.prompt), len(group.prompt) + len(inputs))
            sequences += [(sequence,)] * len(inputs)
            wanted += [True] * len(inputs)
    logits = context.decode(tokens, positions, sequences, wanted)
    result = []
    row = 0
    for group in batch:
        result.append(_sum_endings(logits[row : row + group.n_outputs], group.endings))
        row += group.n_outputs
    return result


def _sum_endings(logits: Float32, endings: Sequence[Sequence[int]]) -> list[float]:
    """Log-likelihoods of endings.

    Parameters
    ----------
    logits : (1 + sum of (len(ending) - 1), n_vocab) float32
        First the row after the prompt, which all endings start from, then the rows of each ending.
    endings : sequence of token sequences
        None of them empty.
    """
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    totals = []
    row = 1
    for ending in endings:
        rows = [0, *range(row, row + len(ending) - 1)]
        totals.append(float(exact[rows, list(ending)].sum()))
        row += len(ending) - 1
    return totals
