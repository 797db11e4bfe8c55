from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

pytest.importorskip("llama_cpp")
pytest.importorskip("optuna")

from edgemerge.cli.search import search_command
from edgemerge.recipe.recipe import load_recipe
from edgemerge.searching import trials
from edgemerge.searching.model_file import ModelFile
from tests.support.dask_cluster import dask_cluster
from tests.support.searches import RECIPE, write_search
from tests.support.tiny_gguf import write_tiny_gguf

pytestmark = pytest.mark.llama

TASK = ("--task", "q=questions.jsonl")
SEARCHED = "model: {search: [b.gguf, c.gguf]}"

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(search_command)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_search(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["recipe.yml", *TASK, "-t", "1", *arguments])
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def fail(*arguments: str, code: int = 1) -> str:
    result = CliRunner().invoke(app, [*arguments])
    assert (result.exit_code, result.stdout) == (code, "")
    return " ".join(result.stderr.split())


def test_a_search_writes_the_best_recipe_and_a_page(folder: Path) -> None:
    found = json.loads(run("--trials", "5", "--report", "page.html", "--json"))
    best = found["trials"][found["best"]]
    recipe = load_recipe("recipe-best.yml")
    assert recipe.slices[0].inputs[0].parameters["weight"][0].value == pytest.approx(
        best["values"]["models[0].weight"], rel=1e-3
    )
    assert recipe.inputs() == tuple(folder / f"{name}.gguf" for name in ("base", "a", "b"))
    assert [one["number"] for one in found["trials"]] == [0, 1, 2, 3, 4]
    assert found["held_out"]["verdicts"][0]["n"] == 12
    page = Path("page.html").read_text()
    assert page.count("<circle") >= 5
    assert "lambda(mlp)[0]" in page
    assert sorted(path.name for path in folder.iterdir() if "best" in path.name) == [
        "recipe-best.yml",
        "recipe-best.yml.trials",
    ]


def test_a_cluster_makes_the_same_trials(folder: Path) -> None:
    def trials_of(*words: str) -> Any:
        found = json.loads(run("--trials", "4", "--json", "-o", *words))
        for trial in found["trials"]:
            del trial["seconds"]
        return found["trials"], found["held_out"]

    alone = trials_of("alone.yml")
    with dask_cluster(folder, 2) as cluster:
        assert trials_of("shared.yml", "--cluster", cluster.address) == alone


def test_what_no_merge_looks_at_is_noted_before_the_work() -> None:
    recipe = Path("recipe.yml")
    recipe.write_text(recipe.read_text().replace("lambda", "lamda"))
    said = CliRunner().invoke(app, ["recipe.yml", *TASK, "-t", "1", "--trials", "2"]).stderr
    assert "unknown parameter 'lamda', which is ignored; did you mean 'lambda'?" in said


def test_a_rank_that_no_matrix_has_is_told_before_the_work() -> None:
    text = RECIPE.replace("task_arithmetic", "tsv").replace(
        "  lambda:", "  rank: 100000\n  lambda:"
    )
    Path("recipe.yml").write_text(text)
    said = CliRunner().invoke(app, ["recipe.yml", *TASK, "-t", "1", "--trials", "2"]).stderr
    assert "warning: rank 100000 counts as " in said


def test_the_same_command_goes_on_and_more_trials_are_added() -> None:
    first = json.loads(run("--trials", "3", "--json"))
    again = json.loads(run("--trials", "3", "--json"))
    assert again == first
    more = json.loads(run("--trials", "4", "--json"))
    assert more["trials"][:3] == first["trials"]
    text = run("--trials", "4", "--scratch", str(Path.cwd()))
    assert "4 trials in" in text
    assert "all 4 trials are made" in text
    assert "held out" in text


def test_trials_are_not_taken_up_where_a_searched_model_was_changed() -> None:
    Path("recipe.yml").write_text(RECIPE.replace("model: b.gguf", SEARCHED))
    write_tiny_gguf(Path("c.gguf"), seed=3)
    run("--trials", "2")
    run("--trials", "2")
    write_tiny_gguf(Path("c.gguf"), seed=4)
    said = fail("recipe.yml", *TASK, "-t", "1", "--trials", "2")
    assert "holds trials of a search with other input files; finish that" in said


def test_a_perplexity_beyond_all_numbers_is_a_refused_trial() -> None:
    head = "- {filter: lm_head, value: {search: [1, 1000000], start: 1}}\n    - {filter: mlp"
    Path("recipe.yml").write_text(RECIPE.replace("F16", "F32").replace("- {filter: mlp", head))
    Path("text.txt").write_text("the sun and the moon. " * 60)
    found = json.loads(run("--trials", "4", "--perplexity", "text.txt", "-c", "32", "--json"))
    start, *others = found["trials"]
    assert start["refusal"] == ""
    assert all(
        "a part of a text is above 1e+300, so its weights" in one["refusal"] for one in others
    )


def test_perplexity_and_size_count_too() -> None:
    Path("recipe.yml").write_text(RECIPE.replace("type: F16", "type: {search: [F16, Q8_0]}"))
    Path("text.txt").write_text("the sun and the moon. " * 60)
    options = ("--perplexity", "text.txt", "-c", "32", "--keep", "text=50", "--weight", "size=0.5")
    found = json.loads(run("--trials", "6", *options, "--json"))
    task, text = found["held_out"]["verdicts"]
    assert (task["name"], task["margin"], text["name"], text["margin"]) == ("q", None, "text", 50)
    assert text["is_text"] is True
    start, *others = found["trials"]
    assert start["figures"][-1]["perplexities"]["text"] > 1
    small = [one for one in others if one["values"]["edgemerge.type"] == "Q8_0"]
    assert small
    for one in small:
        first, last = start["figures"][len(one["scores"]) - 1], one["figures"][-1]
        assert last["n_bytes"] < first["n_bytes"]
        gained = 0.5 * 100 * (1 - last["n_bytes"] / first["n_bytes"])
        if one["is_kept"]:
            assert one["scores"][-1] == pytest.approx(last["accuracies"]["q"] + gained)
    assert load_recipe("recipe-best.yml").out_type in ("F16", "Q8_0")


def test_an_interrupt_leaves_the_best_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    make, made = ModelFile.make, []

    def stop_at_the_third(self: ModelFile, *given: Any) -> int:
        made.append(given)
        if len(made) == 3:
            raise KeyboardInterrupt
        return make(self, *given)

    monkeypatch.setattr(ModelFile, "make", stop_at_the_third)
    said = fail("recipe.yml", *TASK, "-t", "1", "--trials", "4", code=130)
    assert "recipe-best.yml has the best of 2 trials so far" in said
    assert "the same command goes on" in said
    assert "the held-out questions were not asked" in Path("recipe-best.yml").read_text()
    assert load_recipe("recipe-best.yml").method == "task_arithmetic"
    found = json.loads(run("--trials", "4", "--json"))
    assert len(found["trials"]) == 4
    assert "not asked" not in Path("recipe-best.yml").read_text()


def test_without_optuna_the_command_to_install_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "find_spec", lambda _name: None)
    said = fail("recipe.yml", *TASK)
    assert said.endswith("install it with pip install 'edgemerge[run,search]'")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give something to score with --task or --perplexity"),
        ((*TASK, "--keep", "r=2"), "--keep 'r=2': give NAME=NUMBER, a number from 0 for one of q"),
        ((*TASK, "--weight", "q=-1"), "give NAME=NUMBER, a number from 0 for one of q, size"),
        ((*TASK, "--weight", "q=1", "--weight", "q=2"), "one NAME of --weight is given twice"),
        (
            (*TASK, "--keep", "q=1"),
            "every task and text has the weight 0, as what is to be kept has; give another --task",
        ),
    ],
)
def test_options_that_make_no_sense_are_usage_errors(arguments: tuple[str, ...], said: str) -> None:
    plain = fail("recipe.yml", *arguments, code=2).replace("│ ", "").replace(" │", "")
    assert said in " ".join(plain.split())


def test_a_time_needs_a_unit() -> None:
    assert "'30' is no time; write it like 90s, 30m, 1.5h or 2d" in fail(
        "recipe.yml", *TASK, "--time", "30"
    )


def test_outputs_are_checked_before_the_work(folder: Path) -> None:
    Path("recipe-best.yml").write_text("mine")
    assert "exists already" in fail("recipe.yml", *TASK)
    assert "is one of the inputs" in fail("recipe.yml", *TASK, "-o", "recipe.yml", "--force")
    Path("recipe.yml").write_text(RECIPE.replace("model: b.gguf", SEARCHED))
    Path("c.gguf").touch()
    assert "is one of the inputs" in fail("recipe.yml", *TASK, "-o", "c.gguf", "--force")
    (folder / "sub").mkdir()
    (folder / "sub" / "recipe.yml").write_text(RECIPE.replace(".gguf", "-here.gguf"))
    for name in ("base", "a", "b"):
        (folder / "sub" / f"{name}-here.gguf").symlink_to(folder / f"{name}.gguf")
    said = fail("sub/recipe.yml", *TASK, "-o", "best.yml")
    assert "lies where the models of sub/recipe.yml are not found by their names" in said
    assert not Path("best.yml.trials").exists()


def test_nothing_is_replaced_that_this_search_has_not_written() -> None:
    best, page = Path("recipe-best.yml"), Path("page.html")
    best.write_text("mine")
    Path("recipe-best.yml.trials").touch()  # as a search leaves it that was stopped at once
    few = ("--trials", "2")
    said = fail("recipe.yml", *TASK, "-t", "1", *few)
    assert said.endswith(
        "recipe-best.yml: exists, and this search has not written it so; rename it, or give --force to "
        "replace it"
    )
    assert best.read_text() == "mine"
    best.unlink()
    page.write_text("mine too")
    assert "page.html: exists" in fail(
        "recipe.yml", *TASK, "-t", "1", *few, "--report", "page.html"
    )
    assert page.read_text() == "mine too"
    run(*few)
    run(*few)  # its own
    best.write_text(best.read_text() + "# by hand\n")
    assert "has not written it so" in fail("recipe.yml", *TASK, "-t", "1", *few)
    run(*few, "--force", "--report", "page.html")
    assert "by hand" not in best.read_text()


@pytest.mark.parametrize("is_stopped", [False, True])
def test_what_was_changed_during_the_search_is_not_replaced(
    monkeypatch: pytest.MonkeyPatch, is_stopped: bool
) -> None:
    run("--trials", "2")
    best, make = Path("recipe-best.yml"), ModelFile.make

    def change(self: ModelFile, *given: Any) -> int:
        if "by hand" in best.read_text() and is_stopped:
            raise KeyboardInterrupt
        best.write_text("# by hand\n")
        return make(self, *given)

    monkeypatch.setattr(ModelFile, "make", change)
    said = fail("recipe.yml", *TASK, "-t", "1", "--trials", "4", code=130 if is_stopped else 1)
    assert "recipe-best.yml: exists, and this search has not written it so; rename it" in said
    assert best.read_text() == "# by hand\n"
    monkeypatch.setattr(ModelFile, "make", make)
    assert len(json.loads(run("--trials", "4", "--force", "--json"))["trials"]) == 4


def count_trials(path: Path) -> int:
    """Count the trials that a search has kept; 0 before it made its file."""
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            (found,) = database.execute("select count(*) from trials").fetchone()
    except sqlite3.Error:
        return 0
    return int(found)


@pytest.mark.slow
def test_twenty_kills_change_nothing() -> None:
    command = [sys.executable, "-m", "edgemerge", "search", "recipe.yml", *TASK, "-t", "1"]
    command += ["--trials", "100", "--json", "-o"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}

    def finish(output: str) -> Any:
        words = [*command, output]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        for one in found["trials"]:
            del one["seconds"]
        return found

    rng = random.Random(0)
    for _ in range(20):
        wanted = count_trials(Path("killed.yml.trials")) + 1
        with subprocess.Popen(
            [*command, "killed.yml"], env=environment, stdout=subprocess.DEVNULL
        ) as process:
            while count_trials(Path("killed.yml.trials")) < wanted:
                assert process.poll() is None
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 0.05))  # some trials take no longer
            process.kill()
        assert process.returncode == -signal.SIGKILL
    assert 20 <= count_trials(Path("killed.yml.trials")) < 100
    killed, whole = finish("killed.yml"), finish("whole.yml")
    assert killed["trials"] == whole["trials"]
    assert (killed["best"], killed["held_out"]) == (whole["best"], whole["held_out"])
    assert Path("killed.yml").read_bytes() == Path("whole.yml").read_bytes()
