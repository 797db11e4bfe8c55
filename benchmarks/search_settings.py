"""Which settings merge the experts of tests/models best: searched on validation questions only.

Every candidate is scored on the first questions of tests/models/validation, the ten best on all of
them, and the best of each family, chosen by that alone, once on the held-out questions of
tests/models/eval, paired with task arithmetic at lambda 0.7.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from bench_quality import MODELS, SETS
from gguf import GGUFReader
from measure import machine, table

from edgemerge import load_recipe, make_recipe, merge
from edgemerge.runtime.evaluate import Question, option_likelihoods, read_questions
from edgemerge.runtime.llama import Model

MEDICAL = SETS[:2]
REFERENCE = "task_arithmetic lambda=0.7"
FINALISTS = 10
BOOTSTRAPS = 10_000
Tensors = dict[str, np.ndarray]

# Numbers of the searched recipe and where the search starts: lambda of the embeddings, of the norms
# and of each layer; factors of the matrices that write to the residual stream (attention's output
# and down), of q, k, v and of up; and the first expert's weight over the second's.
START = {
    "embed": 0.6,
    "norm": 0.8,
    "layer0": 0.6,
    "layer1": 0.75,
    "layer2": 0.85,
    "layer3": 1.0,
    "write": 1.0,
    "qkv": 1.0,
    "up": 1.0,
    "balance": 1.0,
}
STEPS = (1.25, 1.12, 1.12)


@dataclass
class Candidate:
    """One merge: how its file is made, and how it did."""

    label: str
    family: str  # plain: one method, the same numbers everywhere; shaped: by layer and tensor;
    # searched: shaped, numbers by coordinate search; staged: merges of merges; outside: no recipe
    make: Callable[[Path], None]
    document: dict[str, Any] | None = None  # the recipe, where it is one
    first: dict[str, Marks] = field(default_factory=dict)
    full: dict[str, Marks] = field(default_factory=dict)


@dataclass
class Marks:
    """Of one set of questions: which were answered rightly, and the loss of each."""

    right: np.ndarray
    loss: np.ndarray  # cross-entropy of the right option among the question's options, nats

    @property
    def acc(self) -> float:
        return float(self.right.mean())

    @property
    def stderr(self) -> float:
        return math.sqrt(self.acc * (1 - self.acc) / (len(self.right) - 1))


def score(path: Path, questions: Mapping[str, Sequence[Question]]) -> dict[str, Marks]:
    marks = {}
    with Model(path) as model:
        for name, items in questions.items():
            right, loss = [], []
            found = option_likelihoods(model, items)
            for item, totals in zip(items, (np.array(x.totals) for x in found), strict=True):
                right.append(int(np.argmax(totals)) == item.answer)
                loss.append(float(np.logaddexp.reduce(totals) - totals[item.answer]))
            marks[name] = Marks(np.array(right), np.array(loss))
    return marks


def medical(marks: Mapping[str, Marks]) -> float:
    return float(np.mean([marks[name].acc for name in MEDICAL]))


def medical_stderr(marks: Mapping[str, Marks]) -> float:
    return math.hypot(*(marks[name].stderr for name in MEDICAL)) / len(MEDICAL)


# -- recipes ---------------------------------------------------------------------------------------


def document(
    method: str, models: Sequence[tuple[str, dict[str, Any]]], **parameters: Any
) -> dict[str, Any]:
    found: dict[str, Any] = {"merge_method": method}
    if method == "slerp":
        found["base_model"], *models = [models[0][0], *models[1:]]
    elif method != "linear":
        found["base_model"] = "base"
    found["models"] = [{"model": name, "parameters": own} for name, own in models]
    if "lambda_" in parameters:
        parameters["lambda"] = parameters.pop("lambda_")
    return {**found, "parameters": parameters, "out_dtype": "float16"}


def run_recipe(recipe: Mapping[str, Any], output: Path, folder: Path = MODELS) -> None:
    """Merge as a recipe says, with its models taken from a folder."""
    recipe = json.loads(json.dumps(recipe))
    if "base_model" in recipe:
        recipe["base_model"] = str(folder / recipe["base_model"])
    for model in recipe["models"]:
        model["model"] = str(folder / model["model"])
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(recipe, file)
        file.flush()
        merge(load_recipe(file.name), output, force=True)


def both(weights: tuple[Any, Any] = (1.0, 1.0), **own: Any) -> list[tuple[str, dict[str, Any]]]:
    names = ("expert-a", "expert-b")
    return [(name, {"weight": w, **own}) for name, w in zip(names, weights, strict=True)]


def recipe(label: str, family: str, found: dict[str, Any]) -> Candidate:
    return Candidate(label, family, lambda output: run_recipe(found, output), found)


def plain() -> Iterator[Candidate]:
    """One method with the same numbers for every tensor."""

    def add(method: str, parameters: Mapping[str, float], **own: Any) -> Candidate:
        said = " ".join(f"{k}={v}" for k, v in {**own, **parameters}.items())
        values = {"lambda_" if k == "lambda" else k: v for k, v in parameters.items()}
        return recipe(f"{method} {said}", "plain", document(method, both(**own), **values))

    for scale in (0.5, 0.6, 0.65, 0.7, 0.75, 0.8):
        yield add("task_arithmetic", {"lambda": scale})
    for weights in ((0.65, 0.6), (0.7, 0.6), (0.7, 0.65), (0.75, 0.65), (0.6, 0.7)):
        label = f"task_arithmetic weights={weights[0]}/{weights[1]}"
        yield recipe(label, "plain", document("task_arithmetic", both(weights)))
    for density, scale in ((0.5, 1.0), (0.9, 1.0), (0.9, 1.3)):
        yield add("ties", {"lambda": scale}, density=density)
    for density, scale in ((0.6, 0.7), (0.9, 0.7)):
        yield add("dare_linear", {"lambda": scale}, density=density)
        yield add("della_linear", {"lambda": scale}, density=density, epsilon=0.05)
    for density, scale in ((0.5, 0.7), (0.5, 0.9), (0.8, 0.7), (0.9, 0.7), (0.98, 0.7)):
        yield add("breadcrumbs", {"lambda": scale}, density=density, gamma=0.01)
    for density, scale in ((0.5, 0.7), (0.9, 0.7), (0.9, 0.6)):
        yield add("breadcrumbs_ties", {"lambda": scale}, density=density, gamma=0.01)
    yield add("breadcrumbs", {"lambda": 0.8}, density=0.8, gamma=0.0)
    yield add("breadcrumbs", {"lambda": 0.9}, density=0.5, gamma=0.0)
    yield recipe("slerp t=0.5", "plain", document("slerp", both(), t=0.5))


def shaped() -> Iterator[Candidate]:
    """Task arithmetic with lambda by depth and by kind of tensor."""

    def add(label: str, value: Any) -> Candidate:
        found = document("task_arithmetic", both(), lambda_=value)
        return recipe(f"lambda {label}", "shaped", found)

    def rules(rest: Any, **kinds: float) -> list[dict[str, Any]]:
        return [*({"filter": k, "value": v} for k, v in kinds.items()), {"value": rest}]

    for pair in ([0.8, 0.6], [0.5, 0.9], [0.6, 0.9], [0.6, 1.0], [0.6, 1.2], [0.7, 1.0]):
        yield add(f"{pair[0]} to {pair[1]}", pair)
    for embed, rest in ((0.5, 0.7), (0.6, 0.7), (0.8, 0.65), (1.0, 0.6)):
        yield add(f"embeddings {embed}, rest {rest}", rules(rest, embed_tokens=embed))
    for norm, rest in ((0.5, 0.7), (1.0, 0.7)):
        yield add(f"norms {norm}, rest {rest}", rules(rest, norm=norm))
    for attention, rest in ((0.5, 0.8), (0.9, 0.6)):
        yield add(f"attention {attention}, rest {rest}", rules(rest, self_attn=attention))
    for write, rest in ((0.9, 0.6), (1.1, 0.6), (1.3, 0.5)):
        value = rules(rest, o_proj=write, down_proj=write)
        yield add(f"o and down {write}, rest {rest}", value)
    value = rules([0.6, 1.0], norm=1.0)
    yield add("norms 1.0, rest 0.6 to 1.0", value)
    for method in ("breadcrumbs_ties", "dare_linear", "ties"):
        found = document(method, both(density=0.9), lambda_=[0.6, 1.0])
        yield recipe(f"{method} density=0.9 lambda 0.6 to 1.0", "shaped", found)
    for t in ([0.4, 0.6], [0.6, 0.4]):
        found = document("slerp", both(), t=t)
        yield recipe(f"slerp t {t[0]} to {t[1]}", "shaped", found)


def searched(numbers: Mapping[str, float]) -> Candidate:
    """Task arithmetic with the numbers of `START`."""
    layers = np.array([numbers[f"layer{i}"] for i in range(4)])

    def depth(factor: str) -> list[float]:
        scaled = layers * (numbers[factor] if factor else 1.0)
        return [round(float(x), 3) for x in scaled]

    value: list[dict[str, Any]] = [
        {"filter": "embed_tokens", "value": round(numbers["embed"], 3)},
        {"filter": "norm", "value": round(numbers["norm"], 3)},
        *({"filter": k, "value": depth("write")} for k in ("o_proj", "down_proj")),
        *({"filter": k, "value": depth("qkv")} for k in ("q_proj", "k_proj", "v_proj")),
        {"filter": "up_proj", "value": depth("up")},
        {"value": depth("")},
    ]
    tilt = math.sqrt(numbers["balance"])
    weights = (round(tilt, 3), round(1 / tilt, 3))
    found = document("task_arithmetic", both(weights), lambda_=value)
    return recipe("lambda by layer and kind, searched", "searched", found)


def climb(rate: Callable[[Candidate], float]) -> Candidate:
    """Coordinate search: one number at a time, up or down a step, as long as the rating falls."""
    numbers, best = dict(START), searched(START)
    lowest = rate(best)
    for step in STEPS:
        for name in START:
            for factor in (step, 1 / step):
                tried = searched({**numbers, name: numbers[name] * factor})
                if (rating := rate(tried)) < lowest:
                    numbers[name] *= factor
                    best, lowest = tried, rating
                    break
    print("searched numbers:", {k: round(v, 3) for k, v in numbers.items()}, file=sys.stderr)
    return best


def staged(folder: Path) -> Iterator[Candidate]:
    """Averages of two merges."""
    parts = {
        "task_arithmetic": document("task_arithmetic", both(), lambda_=0.7),
        "breadcrumbs": document("breadcrumbs", both(density=0.8), lambda_=0.8),
        "ties": document("ties", both(density=0.9), lambda_=1.0),
        "dare": document("dare_linear", both(density=0.6), lambda_=0.7),
    }
    for name, found in parts.items():
        run_recipe({**found, "out_dtype": "float32"}, folder / f"{name}.gguf")
    for pair in (("task_arithmetic", "breadcrumbs"), ("task_arithmetic", "ties"), ("ties", "dare")):
        found = document("linear", [(f"{name}.gguf", {"weight": 0.5}) for name in pair])

        def make(output: Path, found: dict[str, Any] = found) -> None:
            run_recipe(found, output, folder)

        yield Candidate(f"average of {pair[0]} and {pair[1]}", "staged", make)


# -- what no recipe says: NumPy on the tensors of the three models ---------------------------------


def read_tensors(path: Path) -> Tensors:
    return {t.name: np.array(t.data, dtype=np.float32) for t in GGUFReader(path).tensors}


def agreement(scale: float, rowwise: bool, base: Tensors, deltas: Sequence[Tensors]) -> Tensors:
    """Sum of task vectors whose length is that of their weighted mean were they orthogonal.

    u = w / sqrt(w'Cw) with C the cosines, clipped to 0..1; an expert that changed nothing is left out.
    """
    merged = {}
    for name, values in base.items():
        stack = np.stack([delta[name] for delta in deltas])
        axis = -1 if rowwise else tuple(range(1, stack.ndim))
        norms = np.sqrt((stack**2).sum(axis, keepdims=True))
        weights = norms > 1e-12 * norms.max(0)
        weights = weights / np.maximum(weights.sum(0), 1)
        unit = stack / np.maximum(norms, 1e-30)
        total = np.zeros_like(norms[0])
        for i, one in enumerate(unit):
            for j, other in enumerate(unit):
                cosine = np.clip((one * other).sum(axis if rowwise else None, keepdims=True), 0, 1)
                cosine = 1.0 if i == j else cosine.reshape(total.shape)
                total += weights[i] * weights[j] * cosine
        shares = weights / np.sqrt(np.maximum(total, 1e-30))
        merged[name] = values + scale * (shares * stack).sum(0)
    return merged


def singular(
    scale: Sequence[float], share: float, rest: float, base: Tensors, deltas: Sequence[Tensors]
) -> Tensors:
    """Task singular vectors (Gargiulo et al. 2025): top ones of each expert, made orthogonal."""
    merged = {}
    n_layers = 1 + max(int(name.split(".")[1]) for name in base if name.startswith("blk."))
    for name, values in base.items():
        if values.ndim < 2 or not name.startswith("blk."):
            merged[name] = values + rest * sum(delta[name] for delta in deltas)
            continue
        depth = int(name.split(".")[1]) / max(1, n_layers - 1)
        parts = [np.linalg.svd(delta[name], full_matrices=False) for delta in deltas]
        n_kept = int(share * len(parts[0][1]))
        left = nearest_orthogonal(np.concatenate([u[:, :n_kept] for u, _, _ in parts], 1))
        right = nearest_orthogonal(np.concatenate([v[:n_kept] for _, _, v in parts]))
        values_kept = np.concatenate([s[:n_kept] for _, s, _ in parts])
        factor = scale[0] + depth * (scale[-1] - scale[0])
        merged[name] = values + factor * (left * values_kept) @ right
    return merged


def nearest_orthogonal(matrix: np.ndarray) -> np.ndarray:
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return left @ right


def outside(folder: Path) -> Iterator[Candidate]:
    models = {}
    for name in ("base", "expert-a", "expert-b"):
        found = make_recipe("passthrough", [(str(MODELS / name), None)], out_type="F16")
        merge(found, folder / f"{name}.gguf")
        models[name] = read_tensors(folder / f"{name}.gguf")
    base = models.pop("base")
    deltas = [{k: v - base[k] for k, v in model.items()} for model in models.values()]

    def add(label: str, combine: Callable[..., Tensors], *arguments: Any) -> Candidate:
        def make(output: Path) -> None:
            shutil.copy(folder / "base.gguf", output)
            file = GGUFReader(output, "r+")
            merged = combine(*arguments, base, deltas)
            for tensor in file.tensors:
                tensor.data[...] = merged[tensor.name].astype(tensor.data.dtype)
            file.data.flush()

        return Candidate(label, "outside", make)

    for scale in (0.9, 1.0, 1.05, 1.1, 1.2):
        yield add(f"agreement by tensor lambda={scale}", agreement, scale, False)
    for scale in (0.9, 1.0, 1.1):
        yield add(f"agreement by row lambda={scale}", agreement, scale, True)
    trials = ((1.0, 1.0), (1.2, 1.2), (1.4, 1.4), (0.9, 1.5), (0.8, 1.8))
    for share, scale in ((s, t) for s in (0.125, 0.25, 0.5) for t in trials):
        said = f"lambda={scale[0]} to {scale[1]}" if scale[0] != scale[1] else f"lambda={scale[0]}"
        yield add(f"singular vectors share={share} {said}", singular, scale, share, 0.6)


# -- choosing and comparing ------------------------------------------------------------------------


def compare(found: Mapping[str, Marks], reference: Mapping[str, Marks]) -> dict[str, Any]:
    """Paired difference over the same medical questions: bootstrap interval and exact McNemar."""
    gains = [found[n].right.astype(int) - reference[n].right.astype(int) for n in MEDICAL]
    rng = np.random.default_rng(0)
    draws = sum(rng.choice(g, (BOOTSTRAPS, len(g))).mean(1) for g in gains) / len(gains)
    won, lost = (int(sum((g == sign).sum() for g in gains)) for sign in (1, -1))
    tail = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1)) / 2 ** (won + lost)
    return {
        "difference": float(np.mean([g.mean() for g in gains])),
        "interval95": [float(x) for x in np.percentile(draws, [2.5, 97.5])],
        "won": won,
        "lost": lost,
        "mcnemar_p": min(1.0, 2 * tail),
    }


def row(candidate: Candidate, marks: Mapping[str, Marks]) -> list[str]:
    loss = np.mean([marks[name].loss.mean() for name in MEDICAL])
    accuracies = [f"{100 * marks[name].acc:.1f}" for name in SETS]
    medical_acc = f"{100 * medical(marks):.1f} ± {100 * medical_stderr(marks):.1f}"
    return [candidate.label, candidate.family, medical_acc, f"{loss:.3f}", *accuracies]


def figures(candidate: Candidate, marks: Mapping[str, Marks]) -> dict[str, Any]:
    found = {name: {"acc": m.acc, "loss": float(m.loss.mean())} for name, m in marks.items()}
    return {"label": candidate.label, "family": candidate.family, **found}


def choose(candidates: Sequence[Candidate], reference: Candidate) -> list[Candidate]:
    """Best medical accuracy of each family, none below the reference on general questions."""
    chosen: dict[str, Candidate] = {}
    for one in sorted(candidates, key=lambda c: medical(c.full), reverse=True):
        if one is not reference and one.full["general"].acc >= reference.full["general"].acc:
            chosen.setdefault(one.family, one)
    return list(chosen.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, default=250, help="questions per set to search with")
    options = parser.parse_args()
    started = time.monotonic()
    validation = {n: read_questions(MODELS / "validation" / f"{n}.jsonl") for n in SETS}
    first = {name: items[: options.first] for name, items in validation.items()}
    header = ["merge", "family", "medical", "loss", *SETS]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        output = folder / "merged.gguf"

        def try_out(
            one: Candidate, questions: Mapping[str, Sequence[Question]]
        ) -> dict[str, Marks]:
            one.make(output)
            return score(output, questions)

        def rate(one: Candidate) -> float:
            one.first = try_out(one, first)
            return float(sum(one.first[name].loss.mean() for name in SETS))

        candidates = [*plain(), *shaped(), *staged(folder), *outside(folder)]
        for one in candidates:
            rate(one)
            print(one.label, f"{time.monotonic() - started:.0f} s", file=sys.stderr)
        candidates.append(climb(rate))
        print(f"Validation, {options.first} questions of each set:\n")
        print(table(header, [row(one, one.first) for one in candidates]))
        reference = next(one for one in candidates if one.label == REFERENCE)
        ranked = sorted(candidates, key=lambda c: medical(c.first), reverse=True)
        # the best of all, and of each family the best, so that every family has its chance
        leaders = {one.family: one for one in reversed(ranked)}.values()
        finalists = [*ranked[:FINALISTS], reference]
        finalists += [one for one in leaders if one not in finalists]
        finalists = list({id(one): one for one in finalists}.values())
        for one in finalists:
            one.full = try_out(one, validation)
        print("\nValidation, all questions:\n")
        print(table(header, [row(one, one.full) for one in finalists]))
        held_out = {n: read_questions(MODELS / "eval" / f"{n}.jsonl") for n in SETS}
        chosen = choose(finalists, reference)
        results = {one.label: try_out(one, held_out) for one in [reference, *chosen]}
    print("\nHeld-out questions:\n")
    print(table(header, [row(one, results[one.label]) for one in [reference, *chosen]]))
    compared = {c.label: compare(results[c.label], results[reference.label]) for c in chosen}
    for one in chosen:
        print(f"\n{one.label} against {REFERENCE}: {compared[one.label]}")
        if one.document:
            print(f"\n{yaml.safe_dump(one.document, sort_keys=False)}")
    report = {
        "bench": "search",
        "machine": machine(),
        "seconds": time.monotonic() - started,
        "first": [figures(one, one.first) for one in candidates],
        "full": [figures(one, one.full) for one in finalists],
        "held_out": [figures(one, results[one.label]) for one in [reference, *chosen]],
        "against_reference": compared,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
