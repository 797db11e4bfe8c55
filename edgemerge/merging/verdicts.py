"""What figures of several models mean for a merge, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from edgemerge.merging.figures import Sums, TensorFigures

__all__ = ["FAR", "LOUD", "Verdict", "judge", "say_far", "say_loud"]

# Of two models' weights: below this cosine they hardly come from one base. Fine-tunes have 0.9 and more.
FAR = 0.5
# Of two experts' changes: the norm of the smaller is 3 % of the larger one's.
LOUD = 30.0
ALIKE = 0.9  # cosine of changes that a merge gains little from
OPPOSED = -0.1  # cosine of changes that a mean partly cancels


class Verdict(NamedTuple):
    """One thing that a comparison tells."""

    name: str  # equal, unchanged, other_base, louder, far_tensors, tokenizers, opposed, alike, apart, near
    sentence: str
    is_warning: bool


def say_far(model: str, reference: str, cosine: float) -> str:
    """Say that a model seems to come from another base than it should."""
    return (
        f"{model} has little in common with {reference} (cosine of the weights {cosine:.2f}): it seems "
        "to come from another base, or its heads are in another order, which edgemerge align tells"
    )


def say_loud(loud: str, quiet: str, ratio: float, what: str) -> str:
    """Say that one model drowns another; `what` is theirs, as "change of the base"."""
    return (
        f"{loud} is {ratio:.3g} times as loud as {quiet} (norm of its {what}) and drowns it; check {loud}, "
        "or give it a smaller weight"
    )


def judge(
    tensors: Sequence[TensorFigures],
    total: Sums,
    names: Sequence[str],
    tokens: Sequence[str],
    *,
    has_base: bool,
) -> tuple[Verdict, ...]:
    """Tell what the figures mean, the most important first.

    Parameters
    ----------
    tensors : sequence of TensorFigures
        Of all tensors.
    total : Sums
        Of all matrices.
    names : sequence of str
        Of A, B and the base.
    tokens : sequence of str
        How tokenizers differ.
    has_base : bool
        Whether changes of a base were compared.
    """
    what = "change of the base" if has_base else "weights"
    found = (
        _compare_changes(tensors, total, names)
        if has_base
        else _compare_models(tensors, total, names)
    )
    warnings = [verdict for verdict in found if verdict.is_warning]
    warnings += _loud(total, names, what)
    warnings += [Verdict("tokenizers", sentence, True) for sentence in tokens]
    return (*warnings, *(verdict for verdict in found if not verdict.is_warning))


def _compare_models(
    tensors: Sequence[TensorFigures], total: Sums, names: Sequence[str]
) -> list[Verdict]:
    """Judge two models without their base."""
    a, b = names
    if all(one.sums.equal == one.sums.n for one in tensors):
        return [Verdict("equal", f"{a} and {b} have the same weights", False)]
    cosine = total.cosine(0, 1) or 0.0
    if cosine < FAR:
        return [Verdict("other_base", say_far(b, a, cosine), True)]
    equal = f"{100 * total.equal / total.n:.3g} % of the weights are equal"
    near = f"{a} and {b} are near each other (cosine {cosine:.4g}, {equal}), as fine-tunes of one base are"
    cosines = {one.name: one.cosine for one in tensors if len(one.shape) > 1}
    return [*_say_far_tensors(b, a, cosines), Verdict("near", near, False)]


def _say_far_tensors(
    model: str, reference: str, cosines: Mapping[str, float | None]
) -> Iterator[Verdict]:
    """Say that some matrices are far where the models as a whole are not."""
    far = [name for name, cosine in cosines.items() if cosine is not None and cosine < FAR]
    if far:
        sentence = (
            f"{len(far)} of {len(cosines)} matrices of {model} have little in common with those of "
            f"{reference}, such as {far[0]}; edgemerge align tells whether heads are in another order"
        )
        yield Verdict("far_tensors", sentence, True)


def _compare_changes(
    tensors: Sequence[TensorFigures], total: Sums, names: Sequence[str]
) -> list[Verdict]:
    """Judge the changes that two models made of a base."""
    a, b, base = names
    found = []
    for i, name in enumerate((a, b)):
        if all(one.sums.kept[i] == one.sums.n for one in tensors):
            found.append(Verdict("unchanged", f"{name} has the weights of {base}", False))
        elif (cosine := _cosine_with_base(total, i)) is not None and cosine < FAR:
            found.append(Verdict("other_base", say_far(name, base, cosine), True))
        else:
            cosines = {
                one.name: _cosine_with_base(one.sums, i) for one in tensors if len(one.shape) > 1
            }
            found += _say_far_tensors(name, base, cosines)
    if all(one.sums.equal == one.sums.n for one in tensors):
        return [*found, Verdict("equal", f"{a} and {b} have the same weights", False)]
    if {"unchanged", "other_base"} & {verdict.name for verdict in found}:
        return found
    return [*found, _compare_directions(total.cosine(0, 1) or 0.0, a, b)]


def _compare_directions(cosine: float, a: str, b: str) -> Verdict:
    changes = f"the changes of {a} and {b}"
    if cosine <= OPPOSED:
        sentence = f"{changes} are opposed (cosine {cosine:.2f}): a mean cancels a part of both"
        return Verdict("opposed", sentence, False)
    if cosine >= ALIKE:
        sentence = f"{changes} are nearly the same (cosine {cosine:.2f}): a merge gains little"
        return Verdict("alike", sentence, False)
    degree = "have little in common" if cosine < 0.1 else "have a part in common"
    sentence = f"{changes} {degree} (cosine {cosine:.2f}), as experts of different tasks have"
    return Verdict("apart", sentence, False)


def _cosine_with_base(sums: Sums, i: int) -> float | None:
    """Return the cosine of a model with its base, of the products of its change and the base."""
    change, both, base = map(float, (sums.grams[i, i], sums.grams[i, 2], sums.grams[2, 2]))
    model = change + 2 * both + base
    return (both + base) / (model * base) ** 0.5 if model > 0 and base > 0 else None


def _loud(total: Sums, names: Sequence[str], what: str) -> list[Verdict]:
    left, right = total.norm(0), total.norm(1)
    if not left or not right or max(left, right) < LOUD * min(left, right):
        return []
    loud, quiet = (names[0], names[1]) if left > right else (names[1], names[0])
    ratio = max(left, right) / min(left, right)
    return [Verdict("louder", say_loud(loud, quiet, ratio, what), True)]
