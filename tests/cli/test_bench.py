from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from matplotlib.image import imread
from typer.testing import CliRunner, Result

from edgemerge.cli.bench import bench_command
from edgemerge.runtime.complaint import PROGRESS_FD
from tests.support import talking
from tests.support.tiny_gguf import write_tiny_gguf

pytestmark = pytest.mark.llama

# What llama-bench itself prints above its rows.
HEADER = """\
| model                          |       size |     params | backend    | threads |            test |                  t/s |
| ------------------------------ | ---------: | ---------: | ---------- | ------: | --------------: | -------------------: |
"""  # noqa: E501
QUICK = ("-p", "8", "-n", "4", "-r", "2", "-t", "1")

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in a folder with a model."""
    app = typer.Typer()
    app.command("bench")(bench_command)
    monkeypatch.chdir(tmp_path)
    write_tiny_gguf(tmp_path / "tiny.gguf")

    def run_command(*arguments: str) -> Result:
        return CliRunner().invoke(app, list(arguments), prog_name="edgemerge")

    return run_command


def succeed(result: Result) -> str:
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split("|")]


def test_the_first_table_is_llama_benchs(run: Run) -> None:
    out = succeed(run("tiny.gguf", *QUICK))
    assert out.startswith(HEADER)
    rows = out.removeprefix(HEADER).splitlines()[:2]
    assert [len(row) for row in rows] == [len(line) for line in HEADER.splitlines()]
    assert [cells(row)[3:6] for row in rows] == [["CPU", "1", "pp8"], ["CPU", "1", "tg4"]]
    for row in rows:
        assert cells(row)[0].startswith("llama")
        assert cells(row)[1:3] == ["0.43 MiB", "0.11 M"]
        assert re.fullmatch(r"\d+\.\d\d ± \d+\.\d\d", cells(row)[6])


def test_the_other_tables_tell_latency_memory_and_load(run: Run) -> None:
    out = succeed(run("tiny.gguf", *QUICK))
    _, latency, memory, notes = out.split("\n\n")
    header, _, prompt, token = map(cells, latency.splitlines())
    assert header[:7] == ["model", "threads", "latency of", "samples", "p50", "p95", "p99"]
    assert prompt[:4] == ["tiny.gguf", "1", "first token, pp8", "20"]
    assert prompt[6] == "-"  # a 99th percentile of 20 is the slowest
    assert token[:4] == ["tiny.gguf", "1", "each token", "8"]
    header, _, row = map(cells, memory.splitlines())
    assert header[1:7] == ["load cold", "load warm", "peak memory", "weights", "KV cache", "rest"]
    assert row[0] == "tiny.gguf"
    assert all(re.fullmatch(r"[\d.]+ [KMG]iB", cell) for cell in row[3:7])
    assert notes.startswith("- weights: those in pages of the file (tiny.gguf ")


def test_json_is_one_object_with_all_figures(run: Run) -> None:
    document = json.loads(succeed(run("tiny.gguf", *QUICK, "--json")))
    assert document == json.loads(json.dumps(document, allow_nan=False))
    (model,) = document["models"]
    assert model["model"] == "tiny.gguf"
    assert (
        model["weights_bytes"] + model["kv_bytes"] + model["rest_bytes"]
        == (model["peak_rss_bytes"])
    )
    prompt, token = model["tests"]
    assert (prompt["n_prompt"], prompt["n_gen"]) == (8, 0)
    assert (token["n_prompt"], token["n_gen"]) == (0, 4)
    for test in (prompt, token):
        assert test["avg_ts"] == pytest.approx(sum(test["samples_ts"]) / 2)
        assert test["n_batch"] == 2048
        assert test["latency_p50_s"] <= test["latency_p95_s"] <= test["latency_p99_s"]
    assert model["acc"] is None


def test_csv_has_a_row_per_test_of_each_model_and_thread_count(run: Run) -> None:
    shutil.copy("tiny.gguf", "twin.gguf")
    out = succeed(run("tiny.gguf", "twin.gguf", *QUICK, "-t", "1,2", "-o", "csv"))
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(r["model_filename"], r["n_threads"], r["n_prompt"], r["n_gen"]) for r in rows] == [
        (name, threads, *kind)
        for name in ("tiny.gguf", "twin.gguf")
        for threads in ("1", "2")
        for kind in (("8", "0"), ("0", "4"))
    ]
    assert len({r["peak_rss_bytes"] for r in rows[:4]}) == 1
    assert all(float(r["avg_ts"]) > 0 for r in rows)


def test_models_stand_side_by_side_with_their_accuracy_and_a_picture(run: Run) -> None:
    shutil.copy("tiny.gguf", "twin.gguf")
    lines = [
        json.dumps({"question": f"q{i}?", "options": ["the", "of"], "answer": 0}) for i in range(9)
    ]
    Path("q.jsonl").write_text("\n".join(lines))
    arguments = ("tiny.gguf", "twin.gguf", *QUICK, "--quality", "mine=q.jsonl", "--limit", "4")
    out = succeed(run(*arguments, "--plot", "x.png"))
    names = [cells(row)[0] for row in out.splitlines()[2:6]]
    assert [name.split()[-1] for name in names] == ["tiny.gguf"] * 2 + ["twin.gguf"] * 2
    header, _, first, second = map(cells, out.split("\n\n")[2].splitlines())
    assert header[-1] == "mine"
    assert first[0] == "tiny.gguf"
    assert second[0] == "twin.gguf"
    assert first[-1] == second[-1]
    acc, stderr = map(float, first[-1].split(" ± "))
    assert stderr == pytest.approx(math.sqrt(acc * (1 - acc) / 3), abs=1e-3)
    assert "- mine: accuracy on 4 questions ± its standard error\n" in out
    assert imread("x.png").shape[:2] == (1000, 1500)


def test_depth_shows_in_the_name(run: Run) -> None:
    out = succeed(run("tiny.gguf", "-p", "0", "-n", "4", "-r", "1", "-t", "1", "--depth", "16"))
    assert "| tg4 @ d16 |" in re.sub(" +", " ", out)
    assert "pp" not in out


def test_usual_lengths_give_way_to_a_short_context(run: Run) -> None:
    result = run("tiny.gguf", "-r", "1", "-t", "1", "--depth", "192")
    assert result.stderr == (
        "note: the context has room for -p 64, which stands for the usual 512\n"
        "note: the context has room for -n 64, which stands for the usual 128\n"
    )
    assert [row in result.stdout for row in ("pp64 @ d192", "tg64 @ d192")] == [True, True]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give one or more GGUF files, or --merge RECIPE.yml"),
        (("tiny.gguf", "-p", "0", "-n", "0"), "there is nothing to measure"),
        (("tiny.gguf", "-t", "1,x"), "must be numbers of threads up to 512, e.g. -t 1,2,4"),
        (("tiny.gguf", "-t", "0"), "must be numbers of threads up to 512, e.g. -t 1,2,4"),
        (("tiny.gguf", "-t", "4,513"), "must be numbers of threads up to 512, e.g. -t 1,2,4"),
        (("tiny.gguf", "-r", "0"), "-r"),
        (("tiny.gguf", "-o", "x.csv"), "'x.csv': -o is the format, md, csv or json; redirect the"),
        (("tiny.gguf", "--limit", "3"), "--limit goes with --quality"),
        (("tiny.gguf", "--quality", "x"), "must be NAME=FILE, e.g."),
        (("tiny.gguf", "--plot", "x.jpg"), "must end in .png, .svg, .pdf"),
        (("tiny.gguf", "-n", "0", "--plot", "x.png"), "give -n"),
        (("tiny.gguf", "--merge", "r.yml"), "--merge measures a merge alone"),
        (("--merge", "r.yml", "-r", "5"), "--merge measures a merge once"),
        (("--merge", "r.yml", "-t", "1"), "--merge measures a merge once"),
    ],
)
def test_contradictions_are_usage_errors(run: Run, arguments: tuple[str, ...], said: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in re.sub(r"\s+", " ", result.stderr.replace("│", " "))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("tiny.gguf", "none.gguf"), "none.gguf: there is no such file"),
        (("tiny.gguf", "tiny.gguf.png"), "tiny.gguf.png: is empty, not a GGUF file; get it again"),
        (("tiny.gguf", "-p", "300"), "tiny.gguf: the tests need a context of 300 tokens"),
        (("tiny.gguf", "--quality", "x=none.jsonl"), "none.jsonl: No such file or directory"),
        (("tiny.gguf", "--plot", "tiny.gguf.png"), "exists already; choose another name"),
        (("--merge", "none.yml"), "none.yml: cannot read the recipe"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(
    run: Run, arguments: tuple[str, ...], said: str
) -> None:
    Path("tiny.gguf.png").touch()
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("edgemerge: ")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("output_format", ["md", "csv", "json"])
def test_a_merge_is_measured(run: Run, golden_dir: Path, output_format: str) -> None:
    for name in ("base", "a"):
        Path(name).symlink_to(golden_dir / "inputs_f32" / name)
    Path("r.yml").write_text(
        "merge_method: linear\nmodels:\n- model: base\n- model: a\nparameters: {weight: 0.5}\n"
    )
    before = sorted(Path().iterdir())
    out = succeed(run("--merge", "r.yml", "-o", output_format))
    assert sorted(Path().iterdir()) == before
    if output_format == "md":
        header, _, row = map(cells, out.split("\n\n")[0].splitlines())
        assert header[-2:] == ["input/s", "of raw read"]
        assert row[:2] == ["r.yml (linear)", "F16"]
        assert out.split("\n\n")[1].startswith("raw read: ")
        return
    figures = json.loads(out) if output_format == "json" else next(csv.DictReader(out.splitlines()))
    assert figures["method"] == "linear"
    assert int(figures["peak_rss_bytes"]) <= int(figures["budget_bytes"])
    assert float(figures["share_of_raw_read"]) == pytest.approx(
        float(figures["read_bytes_per_s"]) / float(figures["raw_read_bytes_per_s"])
    )


@pytest.mark.parametrize("kind", ["delta", "split", "folder", "watched"])
def test_every_merge_is_measured(
    run: Run, kind: str, golden_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: these ended with "No such file", or with a child's exit code 2, and merge took them."""
    base, expert = (str(golden_dir / "inputs_f32" / name) for name in ("base", "a"))
    more = ""
    if kind == "delta":
        assert talking.run("delta", base, expert, "-o", "a.gguf").exit_code == 0
        expert = f"{base}+a.gguf"
    elif kind == "split":
        split = talking.run("convert", expert, "-o", "a.gguf", "--split-max-size", "4K")
        assert split.exit_code == 0
        expert = str(min(Path().glob("a-00001-of-*.gguf")))
    elif kind == "folder":
        more = "edgemerge: {format: hf}\n"
    else:
        monkeypatch.setenv(PROGRESS_FD, str(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)))
    Path("r.yml").write_text(
        f"merge_method: linear\nmodels: [{{model: {base}}}, {{model: {expert}}}]\n"
        f"parameters: {{weight: 0.5}}\n{more}"
    )
    figures = json.loads(succeed(run("--merge", "r.yml", "--json")))
    assert figures["method"] == "linear"
    assert figures["out_bytes"] > 0
