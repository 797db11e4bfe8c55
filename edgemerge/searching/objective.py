"""From what a model scored to one number: the larger, the better.

    score = sum(w accuracy) / sum(w) over tasks, in percent
            - sum(w excess) over texts and the size, where
    excess = percent by which a perplexity, or the size of the file, is above the start's

A task or text that is only to be kept has no part in this sum. What it loses more than its margin, against
the start on the same questions, is subtracted `KEEP_COST` times. The best trial is looked for among those
that lose no more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from edgemerge.runtime.evaluation.answers import Answers

__all__ = ["CLOSE", "SIZE", "Figures", "Objective", "sum_up"]

SIZE = "size"
KEEP_COST = 3.0
CLOSE = 1e-9  # of figures; equal ones may differ by rounding


@dataclass(frozen=True, slots=True)
class Figures:
    """What a model scored.

    Attributes
    ----------
    accuracies : mapping of str to float
        Percent of right answers, by task.
    perplexities : mapping of str to float
        By text.
    n_bytes : int
        Size of the file.
    """

    accuracies: Mapping[str, float]
    perplexities: Mapping[str, float] = field(default_factory=dict)
    n_bytes: int = 0

    def excess(self, name: str, start: Figures) -> float:
        """Return by how many percent a perplexity or the size is above the start's."""
        if name == SIZE:
            return 100 * (self.n_bytes / start.n_bytes - 1)
        return 100 * (self.perplexities[name] / start.perplexities[name] - 1)


def sum_up(answers: Answers, n_bytes: int) -> Figures:
    """Return what answers come to, of a model of so many bytes."""
    accuracies = {name: 100 * right / n for name, (right, n) in answers.counts().items()}
    return Figures(accuracies, answers.perplexities(), n_bytes)


@dataclass(frozen=True, slots=True)
class Objective:
    """What is wanted.

    Attributes
    ----------
    weights : mapping of str to float
        Of tasks, texts and `SIZE`; what is not named weighs nothing.
    keeps : mapping of str to float
        By task or text: percentage points of accuracy, or percent of perplexity, that may be lost.
    """

    weights: Mapping[str, float]
    keeps: Mapping[str, float]

    def score(self, found: Figures, start: Figures) -> float:
        """Score a model; `start` are the start's figures on the same questions."""
        tasks = {n: w for n, w in self.weights.items() if n in found.accuracies and w}
        total = sum(w * found.accuracies[name] for name, w in tasks.items())
        total /= sum(tasks.values()) or 1.0
        for name, weight in self.weights.items():
            if name not in found.accuracies and weight:
                total -= weight * found.excess(name, start)
        return total - KEEP_COST * self.breach(found, start)

    def breach(self, found: Figures, start: Figures) -> float:
        """Return what is lost of what is to be kept, more than the margins; 0 where all is kept."""
        return sum(
            max(0.0, self.loss(name, found, start) - margin) for name, margin in self.keeps.items()
        )

    def keeps_all(self, found: Sequence[Figures], start: Sequence[Figures]) -> bool:
        """Tell whether all that is to be kept is kept; by the figures after each rung."""
        if not found:
            return False
        return self.breach(found[-1], start[len(found) - 1]) <= CLOSE

    def loss(self, name: str, found: Figures, start: Figures) -> float:
        """Return what a task or text has lost: percentage points, or percent of perplexity."""
        if name in found.accuracies:
            return start.accuracies[name] - found.accuracies[name]
        return found.excess(name, start)
