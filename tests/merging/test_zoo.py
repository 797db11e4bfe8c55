"""Real merges of real models, scored through llama.cpp.

The reference accuracies are those of the same merges made with PyTorch in fp32 from the fp16 weights
(tests/models/results.json). The full matrix of methods, inputs and outputs is marked slow.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from edgemerge.merging.run import merge
from edgemerge.recipe.recipe import make_recipe
from edgemerge.runtime.evaluation.evaluate import Score, evaluate
from edgemerge.runtime.evaluation.questions import read_questions
from edgemerge.runtime.llama import Model

pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.llama

DOMAINS = ("disease", "substance", "general")
TOLERANCE = 0.02  # of accuracy, for F16 outputs of F16 inputs


@dataclass(frozen=True)
class Case:
    """One merge of the matrix."""

    method: str
    parameters: dict[str, Any] = field(default_factory=dict)
    reference: str | None = None  # row of results.json


CASES = {
    "linear": Case("linear", reference="linear A+B (= task arith. 0.5)"),
    "slerp": Case("slerp", {"t": 0.5}, "slerp A+B t=.5"),
    "task_arithmetic": Case("task_arithmetic", {"lambda": 0.7}, "task arith. 0.7"),
    "ties": Case("ties", {"density": 0.5}, "ties d=.5 l=1"),
    "dare_linear": Case("dare_linear", {"density": 0.6, "lambda": 0.6}),
    "dare_ties": Case("dare_ties", {"density": 0.6, "lambda": 0.6}),
    "della": Case("della", {"density": 0.6, "epsilon": 0.05, "lambda": 0.6}),
    "della_linear": Case("della_linear", {"density": 0.6, "epsilon": 0.05, "lambda": 0.6}),
    "breadcrumbs": Case("breadcrumbs", {"density": 0.9, "lambda": 0.7}),
    "breadcrumbs_ties": Case("breadcrumbs_ties", {"density": 0.9, "lambda": 0.7}),
    "passthrough": Case("passthrough", reference="expert-a"),
}


def make(case: Case, base: Path, experts: list[Path], output: Path, out_type: str) -> Path:
    """Merge the experts as `case` says."""
    if case.method == "slerp":
        base, experts = experts[0], experts[1:]
    if case.method == "passthrough":
        experts = experts[:1]
    recipe = make_recipe(
        case.method,
        [(str(path), None) for path in experts],
        base=None if case.method in ("linear", "passthrough") else str(base),
        parameters=case.parameters,
        out_type=out_type,
    )
    merge(recipe, output, force=True)
    return output


def score(path: Path, eval_dir: Path) -> dict[str, Score]:
    with Model(path) as model:
        return {d: evaluate(model, read_questions(eval_dir / f"{d}.jsonl")) for d in DOMAINS}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.reference])
def test_f16_scores_are_the_reference(
    name: str, models_dir: Path, eval_dir: Path, tmp_path: Path
) -> None:
    results = json.loads((models_dir / "results.json").read_text())
    experts = [models_dir / "expert-a", models_dir / "expert-b"]
    path = make(CASES[name], models_dir / "base", experts, tmp_path / "out.gguf", "F16")
    for domain, found in score(path, eval_dir).items():
        reference = results[CASES[name].reference][domain]
        assert found.n == reference["n"]
        assert found.acc == pytest.approx(reference["acc"], abs=TOLERANCE)
        assert found.acc_norm == pytest.approx(reference["acc_norm"], abs=TOLERANCE)
        assert found.loss == pytest.approx(reference["loss"], rel=0.02)


@pytest.fixture(scope="module")
def inputs(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Base and experts in every input format of the matrix."""
    folder = tmp_path_factory.mktemp("inputs")
    names = ("base", "expert-a", "expert-b")
    found = {"safetensors": [models_dir / name for name in names]}
    for out_type in ("F16", "Q8_0", "Q4_K_M"):
        found[out_type] = [folder / f"{name}-{out_type}.gguf" for name in names]
        for name, path in zip(names, found[out_type], strict=True):
            recipe = make_recipe("passthrough", [(str(models_dir / name), None)], out_type=out_type)
            merge(recipe, path)
    return found


@pytest.fixture(scope="module")
def twins() -> dict[str, dict[str, Score]]:
    """Scores of the F16 twins, by case; filled as they are needed."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("out_type", ["F16", "Q8_0", "Q4_K_M"])
@pytest.mark.parametrize("source", ["safetensors", "F16", "Q8_0", "Q4_K_M"])
@pytest.mark.parametrize("name", CASES)
def test_matrix(
    name: str,
    source: str,
    out_type: str,
    inputs: dict[str, list[Path]],
    twins: dict[str, dict[str, Score]],
    eval_dir: Path,
    tmp_path: Path,
) -> None:
    """Every method, input and output loads in llama.cpp and scores where its F16 twin does.

    Quantised to 8 bits nothing is lost. 4 bits of a model with rows of 256 cost accuracy, in the
    inputs as in the output: 6 points are about three standard errors.
    """
    case = CASES[name]
    base, *experts = inputs[source]
    found = score(make(case, base, experts, tmp_path / "out.gguf", out_type), eval_dir)
    if name not in twins:
        base, *experts = inputs["F16"]
        twins[name] = score(make(case, base, experts, tmp_path / "twin.gguf", "F16"), eval_dir)
    tolerance = 0.06 if "Q4_K_M" in (source, out_type) else TOLERANCE
    for domain in DOMAINS:
        assert found[domain].acc == pytest.approx(twins[name][domain].acc, abs=tolerance), domain
