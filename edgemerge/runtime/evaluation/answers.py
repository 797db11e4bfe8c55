"""What one model answered to several tasks and texts, and what that comes to."""

from __future__ import annotations

from dataclasses import dataclass, field

from edgemerge.runtime.evaluation.evaluate import Mark
from edgemerge.runtime.evaluation.perplexity import Chunk, perplexity_of

__all__ = ["Answers"]


@dataclass(slots=True)
class Answers:
    """A model's answers; more may be added to them.

    Attributes
    ----------
    marks : dict of str to list of Mark
        By task.
    chunks : dict of str to list of Chunk
        By text.
    """

    marks: dict[str, list[Mark]] = field(default_factory=dict)
    chunks: dict[str, list[Chunk]] = field(default_factory=dict)

    def counts(self) -> dict[str, tuple[int, int]]:
        """Count right answers, and all, by task."""
        return {
            name: (sum(one.right for one in marks), len(marks))
            for name, marks in self.marks.items()
        }

    def perplexities(self) -> dict[str, float]:
        """Return the perplexity of each text."""
        return {name: perplexity_of(chunks).value for name, chunks in self.chunks.items()}
