"""From log-likelihoods to accuracy, as lm-evaluation-harness counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgemerge.runtime.evaluation.likelihood import Likelihoods, option_likelihoods
from edgemerge.runtime.evaluation.questions import Question
from edgemerge.runtime.llama import Model

__all__ = ["Comparison", "Mark", "Score", "compare", "evaluate", "mark", "score"]


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
        Standard error of `acc`; not a number for a single question.
    stderr_norm : float
        Standard error of `acc_norm`.
    """

    acc: float
    acc_norm: float
    loss: float
    n: int
    stderr: float
    stderr_norm: float


@dataclass(frozen=True, slots=True)
class Mark:
    """The options that a model chose, by log-likelihood and by log-likelihood per character."""

    chosen: int
    chosen_norm: int
    right: bool
    right_norm: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models on the same questions.

    Attributes
    ----------
    only_first, only_second : int
        Questions that one of them has right and the other wrong.
    difference : float
        Accuracy of the second less that of the first.
    p : float
        Probability of a split at least as uneven between models that are equally good: McNemar's
        test, exact and two-sided.
    """

    only_first: int
    only_second: int
    difference: float
    p: float


def evaluate(model: Model, questions: Sequence[Question]) -> Score:
    """Score a model on questions.

    Parameters
    ----------
    model : Model
        A loaded model.
    questions : sequence of Question
        At least one.

    Raises
    ------
    RuntimeFailure
        An option is empty or longer than the context, or llama.cpp failed.
    """
    return score(questions, option_likelihoods(model, questions))


def score(questions: Sequence[Question], found: Sequence[Likelihoods]) -> Score:
    """Count right answers.

    Parameters
    ----------
    questions : (n,) sequence of Question
        At least one.
    found : (n,) sequence of Likelihoods
        Of their options.
    """
    marks = [mark(*pair) for pair in zip(questions, found, strict=True)]
    acc, stderr = _mean([one.right for one in marks])
    acc_norm, stderr_norm = _mean([one.right_norm for one in marks])
    right = [question.answer for question in questions]
    loss = -sum(one.totals[i] for one, i in zip(found, right, strict=True))
    n_tokens = sum(one.n_tokens[i] for one, i in zip(found, right, strict=True))
    return Score(acc, acc_norm, loss / n_tokens, len(marks), stderr, stderr_norm)


def mark(question: Question, found: Likelihoods) -> Mark:
    """See which option a model chose; of equal ones it is the first, as in the harness.

    Parameters
    ----------
    question : Question
        What was asked.
    found : Likelihoods
        Of its options.
    """
    lengths = [len(option) for option in question.options]
    chosen = int(np.argmax(found.totals))
    chosen_norm = int(np.argmax(np.divide(found.totals, lengths)))
    return Mark(chosen, chosen_norm, chosen == question.answer, chosen_norm == question.answer)


def _mean(right: Sequence[bool]) -> tuple[float, float]:
    """Mean of zeros and ones, and its standard error from the sample variance."""
    n = len(right)
    mean = sum(right) / n
    return mean, math.sqrt(mean * (1.0 - mean) / (n - 1)) if n > 1 else math.nan


def compare(first: Sequence[Mark], second: Sequence[Mark]) -> Comparison:
    """Compare two models' answers to the same questions.

    Parameters
    ----------
    first, second : (n,) sequence of Mark
        At least one.
    """
    pairs = list(zip(first, second, strict=True))
    only_first = sum(a.right and not b.right for a, b in pairs)
    only_second = sum(b.right and not a.right for a, b in pairs)
    n = only_first + only_second
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1))
    p = min(1.0, 2 * tail / 2**n)
    return Comparison(only_first, only_second, (only_second - only_first) / len(pairs), p)
