"""`edgemerge plan`: what was asked, what is read and written, and memory that adds up."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from edgemerge.cli import make_app
from edgemerge.runtime.doctor import rates

Run = Callable[..., Result]

MODELS = ("base", "a", "b")
NO_BYTES = (  # what the golden models' vocabulary of 64 tokens lacks
    "llama.cpp will not run the output as it is: it has a SentencePiece vocabulary without a token for "
    "230 of the 256 bytes (<0xFF>), and ends at the first character that it does not know"
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden_dir: Path) -> Run:
    """Run a command in a folder that has the golden models under their names."""
    for name in MODELS:
        (tmp_path / name).symlink_to(golden_dir / "inputs_f32" / name)
    monkeypatch.setattr(rates, "_path", lambda: tmp_path / "rates.json")  # nobody measured here
    monkeypatch.chdir(tmp_path)

    def run_command(*arguments: str) -> Result:
        return CliRunner().invoke(make_app(), list(arguments), prog_name="edgemerge")

    return run_command


def succeed(result: Result) -> str:
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def test_plan_prints_a_row_per_kind_of_tensor(run: Run, golden_dir: Path) -> None:
    given = ("-m", "ties", "--base", "base", "a", "-P", "density=0.5", "--threads", "1")
    models = golden_dir / "inputs_f32"
    text = succeed(run("plan", *given, "--type", "Q8_0"))
    assert re.sub(r"[\d.]+ [KM]iB (for|of)", r"# \1", text) == (
        "ties of 2 models to Q8_0\n"
        f"  base   {models}/base\n"
        f"  model  {models}/a\n"
        "  ties: density 0.5, weight 1 (default), normalize on (default), rescale off (default), "
        "lambda 1 (default), svc off (default)\n"
        "tensor                    shape         from  to    reads       size\n"
        "output.weight             1 x [64, 32]  F32   Q8_0      1   2.12 KiB\n"
        "token_embd.weight         1 x [64, 32]  F32   Q8_0      1   2.12 KiB\n"
        "blk.*.attn_norm.weight    2 x [32]      F32   F32       1  256 bytes\n"
        "blk.*.ffn_down.weight     2 x [32, 64]  F32   Q8_0      1   4.25 KiB\n"
        "blk.*.ffn_gate.weight     2 x [64, 32]  F32   Q8_0      1   4.25 KiB\n"
        "blk.*.ffn_up.weight       2 x [64, 32]  F32   Q8_0      1   4.25 KiB\n"
        "blk.*.ffn_norm.weight     2 x [32]      F32   F32       1  256 bytes\n"
        "blk.*.attn_k.weight       2 x [16, 32]  F32   Q8_0      1   1.06 KiB\n"
        "blk.*.attn_output.weight  2 x [32, 32]  F32   Q8_0      1   2.12 KiB\n"
        "blk.*.attn_q.weight       2 x [32, 32]  F32   Q8_0      1   2.12 KiB\n"
        "blk.*.attn_v.weight       2 x [16, 32]  F32   Q8_0      1   1.06 KiB\n"
        "output_norm.weight        1 x [32]      F32   F32       1  128 bytes\n"
        "21 tensors, 22.7 K parameters: reads 177 KiB, writes 24 KiB\n"
        "memory: needs # of 512 MiB: # for Python, kernels and headers, 1 x # for blocks\n"
        f"note: {NO_BYTES}\n"
    )
    assert {path.name for path in Path().iterdir()} == set(MODELS)


def test_plan_shows_what_was_asked_and_marks_defaults(run: Run) -> None:
    given = ("-m", "hierarchical", "--base", "base", "a", "b", "-P", "scope=row")
    text = succeed(run("plan", *given))
    settings = next(line for line in text.splitlines() if line.startswith("  hierarchical: "))
    assert "scope row" in settings
    assert "weighting agreement (default)" in settings
    assert settings.endswith("heads aligned: hard (default)")
    assert succeed(run("plan", *given, "--align", "off")).count("heads aligned: off\n") == 1


def test_plan_warns_as_merge_does(run: Run) -> None:
    given = ("-m", "task_arithmetic", "--base", "base", "a", "a", "-P", "lambda=-1")
    result = run("plan", *given)
    assert (result.exit_code, result.stderr) == (
        0,
        "warning: a is given 2 times, and counts as often\n"
        "warning: lambda is -1: what the experts have learnt is subtracted\n",
    )


def test_the_memory_of_a_plan_adds_up(run: Run) -> None:
    text = succeed(run("plan", "-m", "linear", "a", "b", "--memory", "400MiB", "--threads", "2"))
    size = r"([\d.]+) MiB"
    found = re.search(
        rf"^memory: needs {size} of 400 MiB: {size} for Python, kernels and headers, "
        rf"(\d) x ([\d.]+) KiB for blocks$",
        text,
        re.MULTILINE,
    )
    assert found, text
    needed, fixed, workers, each_kib = map(float, found.groups())
    assert needed == pytest.approx(fixed + workers * each_kib / 1024, abs=0.1)


def test_plan_json(run: Run) -> None:
    given = ("-m", "linear", "a", "b", "--memory", "400M", "--threads", "2", "-P", "t=1")
    document = json.loads(succeed(run("plan", *given, "--json")))
    assert document["notes"] == ["linear does not use the parameter t", NO_BYTES]
    assert (document["budget_bytes"], document["workers"]) == (400 << 20, 2)
    assert document["jobs"][0] == {
        "tensor": "output.weight",
        "shape": [64, 32],
        "from": ["F32", "F32"],
        "to": "F16",
        "passes": 1,
        "rows_per_block": 64,
    }
    assert document["tensors"] == len(document["jobs"]) == 21


def test_a_rank_above_a_matrixs_is_told_and_takes_no_more_memory(run: Run) -> None:
    given = ("-m", "tsv", "--base", "base", "a", "b", "--threads", "1")
    whole, above = (run("plan", *given, "-P", f"rank={n}") for n in (32, 9_999_999))
    told = "warning: rank 9999999 counts as 32: no matrix has more directions\n"
    assert (above.exit_code, above.stderr) == (0, told)
    assert succeed(whole).partition("tensor ")[2] == above.stdout.partition("tensor ")[2]


def test_plan_tells_a_presets_values_from_defaults(run: Run) -> None:
    given = ("-m", "task_arithmetic", "--base", "base", "a", "b", "--preset", "ramp")
    text = succeed(run("plan", *given))
    assert "weight 1 (default), " in text
    assert "lambda 0.6 to 1.2 over the layers (preset)" in text


def test_plans_help_speaks_of_its_own_options(run: Run) -> None:
    text = succeed(run("plan", "-h"))
    assert "--format" in text
    assert "-o" not in text.split()
