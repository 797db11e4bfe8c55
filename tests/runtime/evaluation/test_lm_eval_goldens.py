"""Question by question what lm-evaluation-harness gives (tools/make_lm_eval_goldens.py)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgemerge.merging.run import merge
from edgemerge.recipe.recipe import make_recipe
from edgemerge.runtime.evaluation.evaluate import mark, score
from edgemerge.runtime.evaluation.likelihood import option_likelihoods
from edgemerge.runtime.evaluation.tasks import Task, read_task
from edgemerge.runtime.llama import Model
from tests.support.fixtures import unpacked
from tests.support.packed_json import read_packed_json

pytestmark = pytest.mark.llama
ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "data" / "lm_eval"
GOLDEN = read_packed_json(SAMPLES / "golden.json.xz")["models"]
CASES = [(model, case) for model, cases in GOLDEN.items() for case in cases]
FILES = {
    "medqa": ("medqa", "medqa.jsonl"),
    "medmcqa": ("medmcqa", "medmcqa.json"),
    "pubmedqa": ("pubmedqa", "ori_pqal.json"),
    "mmlu_anatomy": ("mmlu", "anatomy_test.csv"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("float32")


@pytest.fixture(scope="module")
def ggufs(models_dir: Path, folder: Path) -> dict[str, Path]:
    """The harness's models as GGUF in float32."""
    files = {}
    for name in GOLDEN:
        files[name] = folder / f"{name}.gguf"
        recipe = make_recipe("passthrough", [(str(models_dir / name), None)], out_type="F32")
        merge(recipe, files[name])
    return files


def task_of(case: str, n_shots: int) -> Task:
    name = case.split(",")[0]
    if name not in FILES:
        return read_task("questions", unpacked("models") / "eval" / f"{name}.jsonl")
    format_name, file = FILES[name]
    examples = SAMPLES / "anatomy_dev.csv" if n_shots else None
    return read_task(format_name, SAMPLES / file, shots=n_shots, examples=examples)


@pytest.mark.parametrize(("model", "case"), CASES)
def test_the_harness_is_matched(model: str, case: str, ggufs: dict[str, Path]) -> None:
    golden: dict[str, Any] = GOLDEN[model][case]
    questions = task_of(case, golden["shots"]).questions[: len(golden["acc"])]
    hashes = [
        hashlib.sha256(
            json.dumps([[item.prompt, f" {option}"] for option in item.options]).encode()
        ).hexdigest()[:16]
        for item in questions
    ]
    assert hashes == golden["requests_sha256"]

    with Model(ggufs[model]) as loaded:
        found = option_likelihoods(loaded, questions)
    for one, expected in zip(found, golden["log_likelihoods"], strict=True):
        np.testing.assert_allclose(one.totals, expected, atol=1e-3, rtol=0)
        assert np.argmax(one.totals) == np.argmax(expected)
    marks = [mark(*pair) for pair in zip(questions, found, strict=True)]
    assert [one.right for one in marks] == golden["acc"]
    assert [one.right_norm for one in marks] == golden["acc_norm"]
    result = score(questions, found)
    assert {
        "acc": result.acc,
        "acc_stderr": result.stderr,
        "acc_norm": result.acc_norm,
        "acc_norm_stderr": result.stderr_norm,
    } == pytest.approx(golden["results"], abs=1e-12)


def test_prompts_beyond_the_context_are_among_the_cases(ggufs: dict[str, Path]) -> None:
    with Model(ggufs["base"]) as model:
        for case, some in (("pubmedqa", 1), ("mmlu_anatomy, 5 shots", 9)):
            task = task_of(case, GOLDEN["base"][case]["shots"])
            assert sum(one.cut for one in option_likelihoods(model, task.questions)) >= some
