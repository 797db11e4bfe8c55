from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from edgemerge.cli.eval import eval_command
from edgemerge.errors import RuntimeFailure
from edgemerge.merging.run import merge
from edgemerge.recipe.recipe import make_recipe
from edgemerge.runtime.evaluation import suite
from edgemerge.runtime.evaluation.results import sha256_of
from tests.runtime.test_llama import write_lora
from tests.support.fixtures import unpacked
from tests.support.packed_json import read_packed_json
from tests.support.places import TESTS

pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.llama

SAMPLES = TESTS / "data" / "lm_eval"
GENERAL = unpacked("models") / "eval" / "general.jsonl"
GOLDEN = read_packed_json(SAMPLES / "golden.json.xz")["models"]
MEDQA = f"medqa={SAMPLES / 'medqa.jsonl'}"
MMLU = f"mmlu={SAMPLES / 'anatomy_test.csv'}"

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(eval_command)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Path:
    """Folder with base.gguf and expert-a.gguf in float32, and a text."""
    folder = tmp_path_factory.mktemp("eval")
    for name in ("base", "expert-a"):
        recipe = make_recipe("passthrough", [(str(models_dir / name), None)], out_type="F32")
        merge(recipe, folder / f"{name}.gguf")
    items = [json.loads(line) for line in GENERAL.read_text().splitlines()[:60]]
    lines = (f"{item['question']} {item['options'][item['answer']]}.\n" for item in items)
    (folder / "text.txt").write_text("".join(lines))
    return folder


@pytest.fixture(autouse=True)
def folder(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder of one's own with links to the models."""
    monkeypatch.chdir(tmp_path)
    for file in models.iterdir():
        Path(file.name).symlink_to(file)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def fail(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert (result.exit_code, result.stdout) == (1, "")
    return result.stderr


def refuse(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert (result.exit_code, result.stdout) == (2, "")
    return " ".join(result.stderr.split())


def test_models_stand_side_by_side() -> None:
    text = run(
        "base.gguf", "expert-a.gguf", "--task", MEDQA, "--task", str(GENERAL), "--limit", "20"
    )
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["task", "of", "metric", "base", "expert-a"]
    assert lines[1][:4] == ["medqa", "10", "questions", "acc"]
    assert " ".join(lines[1][4:]) == "30.0 % ± 15.3 40.0 % ± 16.3"
    assert lines[2][:6] == ["general", "20", "of", "300", "questions", "acc"]
    assert lines[3][0] == "acc_norm"  # the letters of MedQA have none of their own
    assert "acc minus base's" in text
    assert lines[4][:5] == ["mean", "of", "2", "tasks", "acc"]
    assert " ".join(lines[5]).startswith("± is one standard error; by chance 25.0 %")
    assert [line[:2] for line in lines[8:]] == [["medqa", "expert-a"], ["general", "expert-a"]]


def test_a_p_value_is_never_zero() -> None:
    task = f"disease={GENERAL.with_name('disease.jsonl')}"
    text = run("base.gguf", "expert-a.gguf", "--task", task, "--limit", "60")
    assert text.rstrip().endswith("  < 0.001")


def test_json_is_one_object_with_the_harness_s_figures() -> None:
    found = json.loads(
        run("base.gguf", "expert-a.gguf", "--task", MEDQA, "--task", MMLU, "--json", "-t", "1")
    )
    assert [(one["task"], one["model"]) for one in found["results"]] == [
        (task, model)
        for task in ("medqa", "mmlu_anatomy")
        for model in ("base.gguf", "expert-a.gguf")
    ]
    for one in found["results"]:
        golden = GOLDEN[Path(one["model"]).stem][one["task"]]["results"]
        assert {key: one[key] for key in golden} == pytest.approx(golden)
    comparison = found["comparisons"][0]
    assert (comparison["first"], comparison["second"]) == ("base.gguf", "expert-a.gguf")
    assert comparison["difference"] == pytest.approx(0.1)
    assert 0 < comparison["p"] <= 1
    assert found["output"] is None
    assert len(os.listdir()) == 3  # nothing was written


def test_csv_has_a_line_per_figure() -> None:
    text = run("base.gguf", "--task", MMLU, "--perplexity", "text.txt", "-c", "200", "--csv")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [(row["task"], row["metric"]) for row in rows] == [
        *(("mmlu_anatomy", metric) for metric in ("acc", "acc_norm", "loss")),
        ("text.txt", "perplexity"),
    ]
    assert rows[0]["value"] == "0.2"
    assert float(rows[3]["value"]) > 1
    assert rows[0]["model"] == "base.gguf"


def test_examples_are_taken_and_cuts_are_told() -> None:
    examples = ("--fewshot", str(SAMPLES / "anatomy_dev.csv"))
    text = run("base.gguf", "--task", MMLU, *examples, "--shots", "2")
    assert text.splitlines()[1].startswith("mmlu_anatomy, 2 shots")
    result = CliRunner().invoke(app, ["base.gguf", "--task", MMLU, *examples])
    assert result.exit_code == 0
    assert "mmlu_anatomy, 5 shots" in result.stdout
    assert (
        " of 10 prompts of mmlu_anatomy are longer than the context of base.gguf" in result.stderr
    )


def test_one_question_has_no_standard_error() -> None:
    found = json.loads(run("base.gguf", "--task", MEDQA, "--limit", "1", "--json"))
    assert found["results"][0]["acc_stderr"] is None
    assert "±" not in run("base.gguf", "--task", MEDQA, "--limit", "1")


def test_all_answers_are_kept() -> None:
    text = run("base.gguf", "--task", str(GENERAL), "--limit", "7", "--seed", "3", "-o", "out.json")
    assert text == run("base.gguf", "--task", str(GENERAL), "--limit", "7", "--seed", "3")
    kept = json.loads(Path("out.json").read_text())
    (result,) = kept["results"]
    assert [one["index"] for one in result["questions"]] == sorted(
        one["index"] for one in result["questions"]
    )
    rows = GENERAL.read_text().splitlines()
    for one in result["questions"]:
        item = json.loads(rows[one["index"]])
        assert (one["answer"], len(one["log_likelihoods"])) == (
            item["answer"],
            len(item["options"]),
        )
        assert one["right"] == (one["chosen"] == one["answer"])
    assert sum(one["right"] for one in result["questions"]) / 7 == result["acc"]
    assert kept["seed"] == 3
    assert not Path("out.json.journal").exists()


START = "from tests.cli.test_eval import app; app()"
COMMAND: tuple[str, ...] = (
    "base.gguf",
    "expert-a.gguf",
    "--task",
    str(GENERAL),
    "--perplexity",
    "text.txt",
)
COMMAND += ("-c", "256", "-t", "1", "-o", "out.json")


def start() -> subprocess.Popen[str]:
    """Run in a process of its own, where signals come as from a terminal."""
    return subprocess.Popen(
        [sys.executable, "-c", START, *COMMAND],
        env={**os.environ, "PYTHONPATH": str(TESTS.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def stop_after(n_lines: int, number: signal.Signals) -> tuple[int, str]:
    """Start, send a signal once the journal has that many lines, and return the code and stderr."""
    process = start()
    part = Path("out.json.journal")
    while process.poll() is None and (
        not part.exists() or part.read_bytes().count(b"\n") < n_lines
    ):
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


def test_a_stopped_run_goes_on_where_it_was() -> None:
    run(*COMMAND)
    whole = Path("out.json").read_bytes()
    Path("out.json").unlink()

    code, said = stop_after(30, signal.SIGINT)
    assert code == 130
    assert "interrupted; the same command goes on after the " in said
    assert not Path("out.json").exists()
    code, said = stop_after(200, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert "out.json.journal: going on after " in said
    result = CliRunner().invoke(app, list(COMMAND))
    assert result.exit_code == 0
    assert "out.json.journal: going on after " in result.stderr
    assert Path("out.json").read_bytes() == whole


def test_what_comes_under_the_output_s_name_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: it was replaced, as only the start looked."""
    command = ("base.gguf", "--task", MEDQA, "-o", "out.json")
    whole, document = run(*command), suite.document
    Path("out.json").unlink()

    def arrive(*arguments: Any) -> dict[str, Any]:
        Path("out.json").write_text("of somebody else")
        return document(*arguments)

    monkeypatch.setattr(suite, "document", arrive)
    said = fail(*command)
    assert "out.json: exists already; choose another name or give --force" in said
    assert "move it away, and the same command goes on with out.json.journal" in said
    assert Path("out.json").read_text() == "of somebody else"
    monkeypatch.setattr(suite, "document", document)
    Path("out.json").unlink()
    result = CliRunner().invoke(app, list(command))
    assert result.stdout == whole
    assert "going on after 10 results of an earlier run" in result.stderr


def test_another_model_is_scored_anew() -> None:
    Path("model.gguf").symlink_to(Path("base.gguf").resolve())
    command = ("model.gguf", "--task", MEDQA, "-o", "out.json", "--json")
    first = run(*command)
    Path("out.json.journal").write_text(json.dumps(json.loads(Path("out.json").read_text())) + "\n")
    assert "exists already; choose another name or give --force" in fail(*command)
    Path("model.gguf").unlink()
    Path("model.gguf").symlink_to(Path("expert-a.gguf").resolve())
    result = CliRunner().invoke(app, [*command, "--force"])
    assert result.exit_code == 0
    assert "out.json.journal: an earlier run had other models: starting anew" in result.stderr
    kept = [json.dumps({**json.loads(first), "models": []}), json.dumps(["job", 0, []])]
    Path("other.json.journal").write_text("\n".join(kept) + "\n")
    assert "holds 1 result of an unfinished run with other " in fail(*command[:-2], "other.json")
    assert json.loads(result.stdout)["results"][0]["acc"] != json.loads(first)["results"][0]["acc"]


def test_requests_that_make_no_sense_are_refused() -> None:
    dev = str(SAMPLES / "anatomy_dev.csv")
    assert "--task or --perplexity" in refuse("base.gguf")
    assert "medqa, medmcqa, pubmedqa, mmlu, questions" in refuse("base.gguf", "--task", "arc=x.csv")
    assert "or any NAME=FILE.jsonl" in refuse("base.gguf", "--task", "x.csv")
    assert "or any NAME=FILE.jsonl" in refuse("base.gguf", "--task", "=x.jsonl")
    twice = ("--task", f"own={GENERAL}", "--task", f"own={GENERAL.with_name('disease.jsonl')}")
    assert "two tasks are called own: give one another name" in refuse("base.gguf", *twice)
    assert ": . is a folder; give a file of questions" in refuse("base.gguf", "--task", "m=.")
    assert "--task is given twice" in refuse("base.gguf", "--task", MEDQA, "--task", MEDQA)
    assert "model is given twice" in refuse("base.gguf", "./base.gguf", "--task", MEDQA)
    texts = ("--perplexity", "text.txt", "--perplexity", "text.txt")
    assert "--perplexity is given twice" in refuse("base.gguf", *texts)
    assert "name it with --fewshot" in refuse("base.gguf", "--task", MEDQA, "--shots", "2")
    several = ("--task", MMLU, "--fewshot", dev, "--fewshot", dev)
    assert "there are 1 tasks and 2 files" in refuse("base.gguf", *several)
    own = ("--task", MMLU, "--fewshot", str(SAMPLES / "anatomy_test.csv"))
    assert "its questions are the ones to be asked" in refuse("base.gguf", *own)
    assert "give one" in refuse("base.gguf", "--task", MEDQA, "--json", "--csv")


def test_what_is_missing_is_named_before_any_work() -> None:
    assert "none.gguf: there is no such file" in fail("base.gguf", "none.gguf", "--task", MEDQA)
    assert "none.jsonl: No such file" in fail("base.gguf", "--task", "none.jsonl")
    assert "none.txt: No such file" in fail("base.gguf", "--perplexity", "none.txt")
    assert "is a folder; make a GGUF of it" in fail(".", "--task", MEDQA)
    shutil.copy(GENERAL, "own.jsonl")
    for examples in ((), ("--fewshot", "own.jsonl")):
        task = str(GENERAL) if examples else "own.jsonl"
        same = fail("base.gguf", "--task", task, *examples, "-o", "own.jsonl", "--force")
        assert "own.jsonl: is one of the inputs" in same
    Path("broken.gguf").write_bytes(b"GGUF" + bytes(100))
    bad = fail("base.gguf", "broken.gguf", "--task", MEDQA, "-o", "out.json")
    assert bad.startswith(
        "edgemerge: broken.gguf: is GGUF version 0; only versions 2 and 3 are read"
    )
    assert not Path("out.json.journal").exists()
    assert "-c 256 or less" in fail("base.gguf", "--task", MEDQA, "-c", "999")


def test_without_llama_cpp_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse_to_load() -> None:
        raise RuntimeFailure("install llama.cpp")

    def know_none(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("edgemerge.runtime.library.load_library", refuse_to_load)
    monkeypatch.setattr("importlib.metadata.version", know_none)
    assert fail("base.gguf", "--task", MEDQA) == "edgemerge: install llama.cpp\n"


def test_own_questions_may_have_a_name() -> None:
    Path("a=b.jsonl").symlink_to(GENERAL)
    tasks = ("--task", f"kinds={GENERAL}", "--task", "a=b.jsonl", "--limit", "2")
    found = json.loads(run("base.gguf", *tasks, "--json"))
    assert [one["task"] for one in found["results"]] == ["kinds", "a=b"]


def test_the_files_are_described() -> None:
    assert "phrases_no_exclude_test.jsonl" in run("--help-tasks")


def test_an_adapter_is_added_and_kept_in_the_results() -> None:
    write_lora(Path("lora.gguf"), n_embd=256)
    words = ("base.gguf", "--task", MEDQA, "--limit", "2", "--lora", "lora.gguf=0.5")
    run(*words, "-o", "results.json")
    (kept,) = json.loads(Path("results.json").read_text())["loras"]
    assert (Path(kept["path"]).name, kept["scale"]) == ("lora.gguf", 0.5)
    assert kept["files"][0]["sha256"] == sha256_of(Path("lora.gguf"))
