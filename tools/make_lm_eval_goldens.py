"""Write tests/data/lm_eval/golden.json: what lm-evaluation-harness makes of our sample files.

    pip install 'lm_eval[hf]==0.4.13' torch transformers
    python tools/make_lm_eval_goldens.py

The harness's own tasks run unchanged but for where their questions come from: the prompts, choices and
targets are those of its YAML files. Models run in float32 by PyTorch, one request at a time. The
questions of the samples are made up; only their form is that of the published files.
"""

from __future__ import annotations

import csv
import hashlib
import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.support.fixtures import unpacked

ROOT = Path(__file__).resolve().parents[1]
MODELS = unpacked("models")
SAMPLES = ROOT / "tests" / "data" / "lm_eval"
METRICS = [{"metric": "acc"}, {"metric": "acc_norm"}]
N_QUESTIONS = 40  # of our own sets, from the top
OWN = {  # arc_easy of the harness, for our field names
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "answer",
    "doc_to_choice": "options",
}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def mmlu_rows(path: Path) -> list[dict[str, Any]]:
    """Rows as cais/mmlu has them on the Hub."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {"question": row[0], "choices": row[1:5], "answer": "ABCD".index(row[5])}
            for row in csv.reader(file)
        ]


def hub_rows() -> dict[str, list[dict[str, Any]]]:
    """Our samples as the data sets are on the Hub, which is what the harness reads."""
    entries = json.loads((SAMPLES / "ori_pqal.json").read_text(encoding="utf-8"))
    return {
        "medqa": lines(SAMPLES / "medqa_hub.jsonl"),
        "medmcqa": [{**row, "cop": row["cop"] - 1} for row in lines(SAMPLES / "medmcqa.json")],
        "pubmedqa": list(entries.values()),
        "mmlu_anatomy": mmlu_rows(SAMPLES / "anatomy_test.csv"),
        "disease": lines(MODELS / "eval" / "disease.jsonl")[:N_QUESTIONS],
        "general": lines(MODELS / "eval" / "general.jsonl")[:N_QUESTIONS],
    }


THEIRS = Path(lm_eval.__file__).parent / "tasks"
HARNESS_TASKS = {
    "medqa": THEIRS / "medqa" / "medqa.yaml",
    "medmcqa": THEIRS / "medmcqa" / "medmcqa.yaml",
    "pubmedqa": THEIRS / "pubmedqa" / "pubmedqa.yaml",
    "mmlu_anatomy": THEIRS / "mmlu" / "default" / "mmlu_anatomy.yaml",
}
LOCAL = {"training_split", "validation_split", "dataset_name", "tag", "task_alias"}


def make_task(name: str, rows: Path, examples: Path | None) -> ConfigurableTask:
    """Make a task of the harness that reads our files."""
    files = {"test": str(rows)} | ({"dev": str(examples)} if examples else {})
    config = load_yaml(HARNESS_TASKS[name]) if name in HARNESS_TASKS else OWN
    left_out = LOCAL if examples else LOCAL | {"fewshot_split", "fewshot_config"}
    config = {key: value for key, value in config.items() if key not in left_out} | {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        "metric_list": METRICS,
    }
    return ConfigurableTask(config=config)


def run(model: HFLM, name: str, rows: Path, shots: int, examples: Path | None) -> dict[str, Any]:
    task = make_task(name, rows, examples)
    found = simple_evaluate(model, tasks=[task], num_fewshot=shots, log_samples=True)
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    metrics = found["results"][name]
    return {
        "shots": shots,
        "requests_sha256": [hash_requests(sample) for sample in samples],
        "log_likelihoods": [
            [round(float(one[0][0]), 6) for one in sample["resps"]] for sample in samples
        ],
        "acc": [int(sample["acc"]) for sample in samples],
        "acc_norm": [int(sample["acc_norm"]) for sample in samples],
        "results": {
            key: metrics[f"{key},none"]
            for key in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
        },
    }


def hash_requests(sample: dict[str, Any]) -> str:
    """Hash the texts the harness gave to the model, context and continuation of each choice."""
    arguments = sample["arguments"]
    pairs = (
        [arguments[key] for key in sorted(arguments)] if isinstance(arguments, dict) else arguments
    )
    texts = [list(pair.values()) if isinstance(pair, dict) else list(pair) for pair in pairs]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def main() -> None:
    golden: dict[str, Any] = {
        "versions": {name: version(name) for name in ("lm_eval", "torch", "transformers")}
        | {"python": platform.python_version()},
        "models": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        rows_of = hub_rows() | {"dev": mmlu_rows(SAMPLES / "anatomy_dev.csv")}
        for name, rows in rows_of.items():
            files[name] = Path(folder, f"{name}.jsonl")
            files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
        dev = files.pop("dev")
        for model_name in ("base", "expert-a"):
            model = HFLM(str(MODELS / model_name), dtype="float32", device="cpu", batch_size=1)
            results = {name: run(model, name, path, 0, None) for name, path in files.items()}
            for shots in (
                2,
                5,
            ):  # five do not fit the models' context: prompts lose their beginning
                label = f"mmlu_anatomy, {shots} shots"
                results[label] = run(model, "mmlu_anatomy", files["mmlu_anatomy"], shots, dev)
            golden["models"][model_name] = results
    text = json.dumps(golden, separators=(",", ":"))
    (SAMPLES / "golden.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
