"""The rule of promotion: the same questions to both models, compared question by question.

A task is kept where the interval of the difference, at the stated confidence, excludes a loss of more than
the margin (non-inferiority). It is better where McNemar's exact test says so. A text is kept likewise, by
the log-likelihoods of the same chunks. A model is promoted when all is kept, what shall be better is better,
it answers the smoke question, and it is not slower than the bound.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgemerge.errors import RecipeError
from edgemerge.fleet.site_file import Rule, Site
from edgemerge.formats.gguf.model import GgufModel
from edgemerge.formats.tokenizer.table import cut_alike
from edgemerge.runtime.evaluation.answers import Answers
from edgemerge.runtime.evaluation.evaluate import Mark
from edgemerge.runtime.evaluation.paired import (
    Difference,
    differ_in_marks,
    differ_in_perplexity,
    standard_errors,
    without_infinity,
)
from edgemerge.runtime.evaluation.perplexity import Chunk, perplexity_of
from edgemerge.runtime.smoke import Answer
from edgemerge.sizes import format_rate

__all__ = ["MORE_MEASUREMENTS", "Finding", "Talk", "Verdict", "check_texts", "decide", "find_fault"]
__all__ += ["find_new_fault", "is_slower"]

MORE_MEASUREMENTS = 3  # of speed, before a model is called slow


@dataclass(frozen=True, slots=True)
class Talk:
    """What a model said to the smoke question, and how fast it wrote.

    Attributes
    ----------
    answer : Answer
        To the smoke question.
    speed : float or None
        Tokens/s, the best of its answers.
    """

    answer: Answer
    speed: float | None


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a verdict.

    Attributes
    ----------
    name : str
        Of a task or a text, or `speed`, or `smoke`.
    passes : bool
        Whether this allows the promotion.
    says : str
        The figures, in a sentence.
    figures : mapping
        The same for a machine.
    """

    name: str
    passes: bool
    says: str
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the new model is promoted, why, and from which findings.

    Attributes
    ----------
    fault : str or None
        What is wrong with its answer to the smoke question; of a model that is promoted, the old one's
        has the same fault.
    """

    is_promoted: bool
    reason: str
    findings: tuple[Finding, ...]
    fault: str | None = None

    def as_json(self) -> list[dict[str, Any]]:
        """Return the findings in plain types."""
        return [asdict(one) for one in self.findings]


def check_texts(site: Site, old: Path, new: Path) -> None:
    """See that both models cut the site's texts into the same tokens: perplexity is a figure of a token.

    Raises
    ------
    RecipeError
        The site has texts, and they do not.
    """
    if not site.texts:
        return
    with closing(GgufModel(old)) as first, closing(GgufModel(new)) as second:
        is_alike = cut_alike(first.metadata(), second.metadata())
    if not is_alike:
        raise RecipeError(
            f"texts: the new model has another tokenizer than {old.name}, which it is compared with, so "
            "their perplexities cannot be compared; leave out texts until a model of the new tokenizer "
            "serves",
            path=site.path,
            field="texts",
        )


def decide(rule: Rule, old: Answers, new: Answers, old_talk: Talk, new_talk: Talk) -> Verdict:
    """Apply the rule.

    Parameters
    ----------
    rule : Rule
        The site's.
    old, new : Answers
        Of the model that serves and of the new one, to the same questions.
    old_talk, new_talk : Talk
        What both said, and how fast.
    """
    n_errors = standard_errors(rule.confidence)
    differences = {
        name: differ_in_marks(old.marks[name], new.marks[name], n_errors) for name in new.marks
    }
    findings = [
        _judge_task(name, rule, old.marks[name], new.marks[name], differences[name])
        for name in new.marks
    ]
    findings += [_judge_text(name, rule, old.chunks[name], new.chunks[name]) for name in new.chunks]
    findings += [_judge_gain(rule, differences), _judge_speed(rule, old_talk, new_talk)]
    findings.append(_judge_smoke(rule, old_talk, new_talk))
    failed = [one.says for one in findings if not one.passes]
    return Verdict(
        not failed,
        "; ".join(failed or [one.says for one in findings]),
        tuple(findings),
        find_fault(new_talk.answer, rule.expect),
    )


def find_fault(answer: Answer, expect: str | None) -> str | None:
    """Say what is wrong with a model's answer to the smoke question; None where nothing is.

    Parameters
    ----------
    answer : Answer
        The answer.
    expect : str or None
        What must stand in it, whatever the case of letters.
    """
    if answer.problem is not None:
        return f"it cannot be asked the smoke question ({answer.problem})"
    if not answer.text.strip():
        return "it has no answer to the smoke question"
    if expect is not None and expect.casefold() not in answer.text.casefold():
        said = " ".join(answer.text.split())[:80]
        return f"its answer to the smoke question lacks {expect!r}: {said!r}"
    return "it repeats itself when it is asked the smoke question" if answer.loops else None


def find_new_fault(rule: Rule, answer: Answer, known: Collection[str | None]) -> str | None:
    """Say what is wrong with an answer; without a text to expect, what the old model does too is no fault.

    Parameters
    ----------
    rule : Rule
        With the text that is expected.
    answer : Answer
        The new model's.
    known : collection of str or None
        Faults of the old model.
    """
    fault = find_fault(answer, rule.expect)
    is_known = rule.expect is None and answer.problem is None and fault in known
    return None if is_known else fault


def is_slower(rule: Rule, old: Talk, new: Talk) -> bool:
    """Tell whether the new model wrote more slowly than the rule allows."""
    return bool(old.speed and new.speed and new.speed * rule.slowdown < old.speed)


def _judge_task(
    name: str, rule: Rule, old: Sequence[Mark], new: Sequence[Mark], found: Difference
) -> Finding:
    margin = rule.margin_of(name)
    n = len(new)
    before, after = (sum(one.right for one in marks) for marks in (old, new))
    passes = found.low > -margin
    says = (
        f"{name}: {before} and {after} of {n} right, {found.middle:+.1f} points "
        f"({found.low:+.1f} to {found.high:+.1f} at {100 * rule.confidence:.4g} %, p {found.p:.2g})"
    )
    if not passes:
        says += f", so more than {margin:g} may be lost"
    figures = {
        "n": n,
        "old": before,
        "new": after,
        **asdict(found),
        "margin": margin,
        "confidence": rule.confidence,
    }
    return Finding(name, passes, says, figures)


def _judge_text(name: str, rule: Rule, old: Sequence[Chunk], new: Sequence[Chunk]) -> Finding:
    margin = rule.margin_of(name)
    found = differ_in_perplexity(old, new, rule.confidence)
    before, after = perplexity_of(old).value, perplexity_of(new).value
    passes = found.high < margin
    interval = f"{found.low:+.1f} to {found.high:+.1f}"
    if math.isinf(found.high):
        interval = "no interval from so few chunks"
    says = (
        f"{name}: perplexity {before:.4g} and {after:.4g}, {found.middle:+.1f} % "
        f"({interval} at {100 * rule.confidence:.4g} %)"
    )
    if not passes:
        says += f", so it may be more than {margin:g} % worse"
    figures = {"old": before, "new": after, **without_infinity(asdict(found)), "margin": margin}
    return Finding(name, passes, says, figures | {"confidence": rule.confidence})


def _judge_gain(rule: Rule, differences: Mapping[str, Difference]) -> Finding:
    """See that what shall be better is; of any one of n tasks, p counts n times (Bonferroni)."""
    wanted = tuple(differences) if rule.better is None else rule.better
    n_tries = len(wanted) if rule.better is None else 1
    level = (1 - rule.confidence) / max(1, n_tries)
    better = [name for name in wanted if _is_better(differences[name], level)]
    figures = {"wanted": list(wanted), "better": better, "level": level}
    if rule.better is None:
        says = f"{' and '.join(better)} better" if better else "no task is better for certain"
        return Finding("better", bool(better), says, figures)
    lacking = [name for name in wanted if name not in better]
    says = f"{' and '.join(lacking)} not better for certain"
    if not lacking:
        says = f"{' and '.join(better)} better" if better else "no task had to be better"
    return Finding("better", not lacking, says, figures)


def _is_better(found: Difference, level: float) -> bool:
    return found.middle > 0 and found.p is not None and found.p < level


def _judge_speed(rule: Rule, old: Talk, new: Talk) -> Finding:
    if old.speed is None or new.speed is None:
        return Finding("speed", True, "speed: not measured")
    says = f"speed: {format_rate(old.speed)} and {format_rate(new.speed)} tokens/s"
    passes = not is_slower(rule, old, new)
    if not passes:
        says += f", more than {rule.slowdown:g} times slower"
    return Finding("speed", passes, says, {"old": old.speed, "new": new.speed})


def _judge_smoke(rule: Rule, old: Talk, new: Talk) -> Finding:
    fault = find_new_fault(rule, new.answer, [find_fault(old.answer, None)])
    says = "smoke: it answers" if fault is None else f"smoke: {fault}"
    return Finding(
        "smoke", fault is None, says, {"question": new.answer.question, "said": new.answer.text}
    )
