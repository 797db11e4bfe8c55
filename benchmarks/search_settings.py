"""Which settings merge the experts of tests/models best: searched on validation questions only.

Every candidate is scored on the first questions of tests/models/validation, the best on all of them;
the best of each family by that is scored on the held-out questions of tests/models/eval.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # where cores are in use, its waiting ones spin

import numpy as np
import yaml
from bench_quality import MODELS
from gguf import GGUFReader
from measure import machine, table
from quality_scores import MEDICAL, SETS

from edgemerge import load_recipe, make_recipe, merge
from edgemerge.runtime.evaluation.likelihood import option_likelihoods
from edgemerge.runtime.evaluation.questions import Question, read_questions
from edgemerge.runtime.llama import Model

REFERENCE = "task_arithmetic lambda=0.7"
FINALISTS = 10
BOOTSTRAPS = 10_000
Tensors = dict[str, np.ndarray]

# Numbers of the searched recipe and where the search starts: lambda of the embeddings, of the norms
# and of each layer; factors of the matrices that write to the residual stream (attention's output
# and down), of q, k, v and of up; and the first expert's weight over the second's.
START = {"embed": 0.6, "norm": 0.8, "write": 1.0, "qkv": 1.0, "up": 1.0, "balance": 1.0}
START |= {"layer0": 0.6, "layer1": 0.75, "layer2": 0.85, "layer3": 1.0}
STEPS = (1.25, 1.12, 1.12)


@dataclass
class Marks:
    """Of one set of questions: which were answered rightly, and the loss of each."""

    right: np.ndarray
    loss: np.ndarray  # cross-entropy of the right option among the question's options, nats

    @property
    def acc(self) -> float:
        return float(self.right.mean())


@dataclass(eq=False)
class Candidate:
    """One merge: how its file is made, and how it did."""

    label: str
    family: str  # plain, shaped (by layer and tensor), searched, staged (of merges) or outside
    make: Callable[[Path], None]
    document: dict[str, Any] | None = None  # the recipe, where it is one
    first: dict[str, Marks] = field(default_factory=dict)
    full: dict[str, Marks] = field(default_factory=dict)

    def score(self, output: Path, questions: Mapping[str, Sequence[Question]]) -> dict[str, Marks]:
        self.make(output)
        marks = {}
        with Model(output, n_threads=1) as model:  # waiting threads spin: slow on a machine in use
            for name, items in questions.items():
                right, loss = [], []
                found = (np.array(x.totals) for x in option_likelihoods(model, items))
                for item, totals in zip(items, found, strict=True):
                    right.append(int(np.argmax(totals)) == item.answer)
                    loss.append(float(np.logaddexp.reduce(totals) - totals[item.answer]))
                marks[name] = Marks(np.array(right), np.array(loss))
        return marks


def medical(marks: Mapping[str, Marks]) -> float:
    return float(np.mean([marks[name].acc for name in MEDICAL]))


# -- recipes ---------------------------------------------------------------------------------------


def document(
    method: str, models: Sequence[tuple[str, dict[str, Any]]], parameters: Mapping[str, Any]
) -> dict[str, Any]:
    found: dict[str, Any] = {"merge_method": method}
    if method == "slerp":
        found["base_model"], models = models[0][0], models[1:]
    elif method != "linear":
        found["base_model"] = "base"
    found["models"] = [{"model": name, "parameters": own} for name, own in models]
    return {**found, "parameters": dict(parameters), "out_dtype": "float16"}


def run_recipe(given: Mapping[str, Any], output: Path, folder: Path = MODELS) -> None:
    """Merge as a recipe says, with its models taken from a folder."""
    recipe = json.loads(json.dumps(given))
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
        found = document(method, both(**own), parameters)
        return recipe(f"{method} {said}", "plain", found)

    for scale in (0.5, 0.6, 0.65, 0.7, 0.75, 0.8):
        yield add("task_arithmetic", {"lambda": scale})
    for pair in ((0.65, 0.6), (0.7, 0.6), (0.75, 0.65), (0.6, 0.7)):
        found = document("task_arithmetic", both(pair), {})
        yield recipe(f"task_arithmetic weights={pair[0]}/{pair[1]}", "plain", found)
    for density, scale in ((0.5, 1.0), (0.9, 1.0), (0.9, 1.3)):
        yield add("ties", {"lambda": scale}, density=density)
    for density in (0.6, 0.9):
        yield add("dare_linear", {"lambda": 0.7}, density=density)
        yield add("dare_ties", {"lambda": 0.7}, density=density)
        yield add("della_linear", {"lambda": 0.7}, density=density, epsilon=0.05)
    for density, scale in ((0.5, 0.7), (0.5, 0.9), (0.8, 0.7), (0.8, 0.8), (0.9, 0.7)):
        yield add("breadcrumbs", {"lambda": scale}, density=density, gamma=0.01)
    for density, scale in ((0.5, 0.9), (0.8, 0.8), (0.9, 0.7)):
        yield add("breadcrumbs", {"lambda": scale}, density=density, gamma=0.0)
    for density, scale in ((0.5, 0.7), (0.9, 0.7), (0.9, 0.6)):
        yield add("breadcrumbs_ties", {"lambda": scale}, density=density, gamma=0.01)
    yield recipe("slerp t=0.5", "plain", document("slerp", both(), {"t": 0.5}))


def shaped() -> Iterator[Candidate]:
    """Task arithmetic with lambda by depth and by kind of tensor."""

    def add(label: str, value: Any, **kinds: Any) -> Candidate:
        rules = [{"filter": kind, "value": own} for kind, own in kinds.items()]
        settings = {"lambda": [*rules, {"value": value}] if kinds else value}
        found = document("task_arithmetic", both(), settings)
        return recipe(f"lambda {label}", "shaped", found)

    for pair in ([0.8, 0.6], [0.5, 0.9], [0.6, 0.9], [0.6, 1.0], [0.6, 1.2]):
        yield add(f"{pair[0]} to {pair[1]}", pair)
    trials: dict[str, Any] = {"embed_tokens": ((0.5, 0.7), (0.6, 0.7), (0.8, 0.65), (1.0, 0.6))}
    trials |= {"norm": ((0.5, 0.7), (1.0, 0.7)), "self_attn": ((0.5, 0.8), (0.9, 0.6))}
    for kind, own, rest in ((kind, *pair) for kind, pairs in trials.items() for pair in pairs):
        yield add(f"{kind} {own}, rest {rest}", rest, **{kind: own})
    for own, rest in ((0.9, 0.6), (1.1, 0.6), (1.3, 0.5), (1.5, 0.5), (1.3, 0.4)):
        kinds = {"o_proj": own, "down_proj": own}
        yield add(f"o and down {own}, rest {rest}", rest, **kinds)
        yield add(f"o and down {own}, embeddings 0.6, rest {rest}", rest, embed_tokens=0.6, **kinds)
    for ends in ([0.8, 1.2], [1.0, 1.5]):
        label = f"o and down {ends[0]} to {ends[1]}, embeddings 0.6, rest 0.5 to 0.8"
        yield add(label, [0.5, 0.8], embed_tokens=0.6, o_proj=ends, down_proj=ends)
    for method in ("breadcrumbs_ties", "dare_linear", "ties"):
        found = document(method, both(density=0.9), {"lambda": [0.6, 1.0]})
        yield recipe(f"{method} density=0.9 lambda 0.6 to 1.0", "shaped", found)
    for t in ([0.4, 0.6], [0.6, 0.4]):
        yield recipe(f"slerp t {t[0]} to {t[1]}", "shaped", document("slerp", both(), {"t": t}))


def searched(numbers: Mapping[str, float]) -> Candidate:
    """Task arithmetic with the numbers of `START`."""
    layers = np.array([numbers[f"layer{i}"] for i in range(4)])

    depth = {
        kind: [round(float(x), 3) for x in layers * numbers.get(kind, 1.0)]
        for kind in ("write", "qkv", "up", "rest")
    }
    value: list[dict[str, Any]] = [
        {"filter": "embed_tokens", "value": round(numbers["embed"], 3)},
        {"filter": "norm", "value": round(numbers["norm"], 3)},
        *({"filter": k, "value": depth["write"]} for k in ("o_proj", "down_proj")),
        *({"filter": k, "value": depth["qkv"]} for k in ("q_proj", "k_proj", "v_proj")),
        {"filter": "up_proj", "value": depth["up"]},
        {"value": depth["rest"]},
    ]
    tilt = math.sqrt(numbers["balance"])
    weights = (round(tilt, 3), round(1 / tilt, 3))
    found = document("task_arithmetic", both(weights), {"lambda": value})
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
    return best


def staged(folder: Path) -> Iterator[Candidate]:
    """Averages of two merges."""
    parts = {
        "task_arithmetic": document("task_arithmetic", both(), {"lambda": 0.7}),
        "breadcrumbs": document("breadcrumbs", both(density=0.8), {"lambda": 0.8}),
        "ties": document("ties", both(density=0.9), {"lambda": 1.0}),
        "dare": document("dare_linear", both(density=0.6), {"lambda": 0.7}),
    }
    for name, found in parts.items():
        run_recipe({**found, "out_dtype": "float32"}, folder / f"{name}.gguf")
    for pair in (("task_arithmetic", "breadcrumbs"), ("task_arithmetic", "ties"), ("ties", "dare")):
        found = document("linear", [(f"{name}.gguf", {"weight": 0.5}) for name in pair], {})

        def make(output: Path, found: dict[str, Any] = found) -> None:
            run_recipe(found, output, folder)

        yield Candidate(f"average of {pair[0]} and {pair[1]}", "staged", make)


# -- what no recipe says: NumPy on the tensors of the three models ---------------------------------


def agreement(scale: float, rowwise: bool, base: Tensors, deltas: Sequence[Tensors]) -> Tensors:
    """Sum of task vectors with weights u = w / sqrt(w'Cw), C their cosines clipped to 0..1."""
    merged = {}
    for name, values in base.items():
        stack = np.stack([d[name].reshape(-1, values.shape[-1] if rowwise else 1) for d in deltas])
        stack = stack if rowwise else stack.reshape(len(deltas), 1, -1)
        norms = np.sqrt((stack**2).sum(-1))
        weights = (norms > 1e-12 * norms.max(0)).astype(np.float64)  # unchanged experts left out
        weights /= np.maximum(weights.sum(0), 1)
        unit = stack / np.maximum(norms, 1e-30)[..., None]
        cosines = np.clip(np.einsum("irk,jrk->ijr", unit, unit), 0, 1)
        length = np.sqrt(np.einsum("ir,ijr,jr->r", weights, cosines, weights))
        shares = weights / np.maximum(length, 1e-15)
        merged[name] = values + scale * (shares[..., None] * stack).sum(0).reshape(values.shape)
    return merged


def singular(
    scale: Sequence[float], share: float, rest: float, base: Tensors, deltas: Sequence[Tensors]
) -> Tensors:
    """Task singular vectors (Gargiulo et al. 2025): top ones of each expert, made orthogonal."""
    merged = {}
    last = max(int(name.split(".")[1]) for name in base if name.startswith("blk."))
    for name, values in base.items():
        if values.ndim < 2 or not name.startswith("blk."):
            merged[name] = values + rest * sum(delta[name] for delta in deltas)
            continue
        parts = [np.linalg.svd(delta[name], full_matrices=False) for delta in deltas]
        k = int(share * len(parts[0][1]))
        left = nearest_orthogonal(np.concatenate([u[:, :k] for u, _, _ in parts], 1))
        right = nearest_orthogonal(np.concatenate([v[:k] for _, _, v in parts]))
        lengths = np.concatenate([s[:k] for _, s, _ in parts])
        factor = scale[0] + int(name.split(".")[1]) / max(1, last) * (scale[1] - scale[0])
        merged[name] = values + factor * (left * lengths) @ right
    return merged


def nearest_orthogonal(matrix: np.ndarray) -> np.ndarray:
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray(left @ right)


def outside(folder: Path) -> Iterator[Candidate]:
    models = {}
    for name in ("base", "expert-a", "expert-b"):
        found = make_recipe("passthrough", [(str(MODELS / name), None)], out_type="F16")
        merge(found, folder / f"{name}.gguf")
        file = GGUFReader(folder / f"{name}.gguf")
        models[name] = {t.name: np.array(t.data, dtype=np.float32) for t in file.tensors}
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

    for how, scale in ((h, s) for h in ("tensor", "row") for s in (0.9, 1.0, 1.1, 1.2)):
        yield add(f"agreement by {how} lambda={scale}", agreement, scale, how == "row")
    trials = ((1.0, 1.0), (1.2, 1.2), (1.4, 1.4), (0.9, 1.5), (0.8, 1.8))
    for share, ends in ((s, t) for s in (0.125, 0.25, 0.5) for t in trials):
        said = f"lambda={ends[0]} to {ends[1]}" if ends[0] != ends[1] else f"lambda={ends[0]}"
        yield add(f"singular vectors share={share} {said}", singular, ends, share, 0.6)


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


def show(
    title: str, found: Sequence[tuple[Candidate, Mapping[str, Marks]]]
) -> list[dict[str, Any]]:
    """Print a table of accuracies in percent and return its figures."""
    rows = []
    for one, marks in found:
        variances = [marks[name].right.var(ddof=1) / len(marks[name].right) for name in MEDICAL]
        total = f"{100 * medical(marks):.1f} ± {100 * math.sqrt(sum(variances)) / 2:.1f}"
        loss = f"{np.mean([marks[name].loss.mean() for name in MEDICAL]):.3f}"
        parts = [f"{100 * marks[name].acc:.1f}" for name in SETS]
        rows.append([one.label, one.family, total, loss, *parts])
    print(f"\n{title}:\n\n{table(['merge', 'family', 'medical', 'loss', *SETS], rows)}")
    return [
        {"label": one.label, "family": one.family}
        | {name: {"acc": m.acc, "loss": float(m.loss.mean())} for name, m in marks.items()}
        for one, marks in found
    ]


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
    first = {n: items[: options.first] for n, items in validation.items()}
    with tempfile.TemporaryDirectory() as name:
        folder, output = Path(name), Path(name) / "merged.gguf"

        def rate(one: Candidate) -> float:
            one.first = one.score(output, first)
            return float(sum(marks.loss.mean() for marks in one.first.values()))

        candidates = [*plain(), *shaped(), *staged(folder), *outside(folder)]
        for one in candidates:
            rate(one)
        candidates.append(climb(rate))
        report = {"first": show("Validation, in part", [(c, c.first) for c in candidates])}
        reference = next(one for one in candidates if one.label == REFERENCE)
        ranked = sorted(candidates, key=lambda c: medical(c.first), reverse=True)
        leaders = {one.family: one for one in reversed(ranked)}.values()  # best of each family
        finalists = list(dict.fromkeys([*ranked[:FINALISTS], reference, *leaders]))
        for one in finalists:
            one.full = one.score(output, validation)
        report["full"] = show("Validation, all questions", [(one, one.full) for one in finalists])
        held_out = {n: read_questions(MODELS / "eval" / f"{n}.jsonl") for n in SETS}
        chosen = choose(finalists, reference)
        results = [(one, one.score(output, held_out)) for one in (reference, *chosen)]
    report["held_out"] = show("Held-out questions", results)
    for (one, marks), entry in zip(results, report["held_out"], strict=True):
        entry["against_reference"] = compare(marks, results[0][1])
        print(f"\n{one.label} against {REFERENCE}: {entry['against_reference']}")
        if one.document:
            print(f"\n{yaml.safe_dump(json.loads(json.dumps(one.document)), sort_keys=False)}")
    about = {"machine": machine(), "seconds": time.monotonic() - started}
    print(json.dumps({"bench": "search", **about, **report}))


if __name__ == "__main__":
    main()
