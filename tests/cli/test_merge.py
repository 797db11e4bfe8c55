from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner, Result

from edgemerge.cli import make_app
from edgemerge.output.file import OutputFile
from tests.support.small_models import stored

Run = Callable[..., Result]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden_dir: Path) -> Path:
    """Working directory with the golden models under their names."""
    for name in ("base", "a", "b"):
        (tmp_path / name).symlink_to(golden_dir / "inputs_f32" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder: Path) -> Run:
    def run_command(*arguments: str) -> Result:
        return CliRunner().invoke(make_app(), list(arguments), prog_name="edgemerge")

    return run_command


def succeed(result: Result) -> str:
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def fail(result: Result) -> str:
    """One sentence on stderr and nothing else anywhere."""
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("edgemerge: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("edgemerge: ").rstrip("\n")


NO_BYTES = (  # what the golden models' vocabulary of 64 tokens lacks
    "llama.cpp will not run the output as it is: it has a SentencePiece vocabulary without a token for "
    "230 of the 256 bytes (<0xFF>), and ends at the first character that it does not know"
)


def made() -> set[str]:
    return set(os.listdir()) - {"base", "a", "b"}


# -- merge -----------------------------------------------------------------------------------------


def test_merge_says_what_it_did(run: Run) -> None:
    text = succeed(run("merge", "-m", "linear", "a", "b", "-o", "out.gguf", "--threads", "1"))
    assert re.sub(r"[\d.]+ s|at peak|[\d.]+ [MG]iB|[0-9a-f]{64}", "#", text) == (
        "out.gguf  48.8 KiB, F16, linear\n"
        "  21 tensors, 22.7 K parameters in # with 1 worker\n"
        "  memory # # of #, read 177 KiB, wrote 48.8 KiB\n"
        "  sha256 #\n"
        f"  note: {NO_BYTES}\n"
    )
    assert made() == {"out.gguf"}


def test_merge_json_is_one_object_with_the_fields_of_the_contract(run: Run, folder: Path) -> None:
    given = ("-m", "linear", "a=0.75", "b=0.25", "-o", "out.gguf", "--threads", "2", "--json")
    document = json.loads(succeed(run("merge", *given)))
    digest = subprocess.run(["sha256sum", "out.gguf"], capture_output=True, text=True, check=True)
    assert document.pop("seconds") > 0
    assert document.pop("peak_rss_bytes") > 0
    assert document.pop("machine")
    assert document.pop("finished").startswith("20")
    assert set(document.pop("versions")) == {"edgemerge", "numpy", "python"}
    assert document.pop("recipe")["method"] == "linear"
    assert document.pop("seed") == 0
    inputs = document.pop("inputs")
    assert [(one["name"], one["is_base"]) for one in inputs] == [("a", False), ("b", False)]
    assert all(re.fullmatch("[0-9a-f]{8}", one["crc32"]) for one in inputs)
    assert document == {
        "output": "out.gguf",
        "out_bytes": (folder / "out.gguf").stat().st_size,
        "method": "linear",
        "models": ["a", "b"],
        "file_type": "F16",
        "type_bytes": {"F16": 45056, "F32": 640},
        "tensors": 21,
        "elements": 22688,
        "budget_bytes": 512 << 20,
        "read_bytes": 2 * 4 * 22688,
        "written_bytes": (folder / "out.gguf").stat().st_size,
        "passes": 1,
        "workers": 2,
        "resumed_tensors": 0,
        "damaged_tensors": 0,
        "sha256": digest.stdout.split()[0],
        "notes": [NO_BYTES],
        "files": [],
    }


def test_a_recipe_and_flags_give_the_same_tensors(run: Run) -> None:
    Path("recipe.yml").write_text(
        "merge_method: ties\nbase_model: base\nmodels:\n"
        "- {model: a, parameters: {weight: 0.6, density: 0.5}}\n"
        "- {model: b, parameters: {weight: 0.4, density: 0.5}}\n"
    )
    succeed(run("merge", "recipe.yml", "-o", "recipe.gguf"))
    flags = ("-m", "ties", "--base", "base", "a=0.6", "b=0.4", "-P", "density=0.5")
    succeed(run("merge", *flags, "-o", "flags.gguf"))
    assert stored(Path("recipe.gguf")) == stored(Path("flags.gguf"))
    succeed(run("merge", "recipe.yml", "-o", "typed.gguf", "--type", "Q8_0"))
    assert {dtype for dtype, _ in stored(Path("typed.gguf")).values()} == {"Q8_0", "F32"}


def test_the_seed_is_the_flags_then_the_recipes(run: Run) -> None:
    recipe = "merge_method: dare_linear\nbase_model: base\nmodels: [{model: a}]\n"
    recipe += "parameters: {weight: 1, density: 0.5}\n"
    Path("zero.yml").write_text(recipe)
    Path("one.yml").write_text(recipe + "edgemerge: {seed: 1}\n")
    succeed(run("merge", "zero.yml", "-o", "0.gguf"))
    succeed(run("merge", "one.yml", "-o", "1.gguf"))
    succeed(run("merge", "one.yml", "-o", "10.gguf", "--seed", "0"))
    assert stored(Path("10.gguf")) == stored(Path("0.gguf")) != stored(Path("1.gguf"))


def test_gguf_and_hugging_face_mix_freely(run: Run) -> None:
    succeed(run("convert", "a", "-o", "a.gguf", "--type", "F32"))
    succeed(run("merge", "-m", "slerp", "--base", "a", "b", "-P", "t=0.3", "-o", "hub.gguf"))
    succeed(run("merge", "-m", "slerp", "--base", "a.gguf", "b", "-P", "t=0.3", "-o", "mix.gguf"))
    assert stored(Path("mix.gguf")) == stored(Path("hub.gguf"))


def test_the_report_is_written_and_checked_before_the_work(run: Run) -> None:
    given = ("merge", "-m", "linear", "a", "b", "-o", "out.gguf", "--report")
    assert (
        fail(run(*given, "no/r.html")) == "no/r.html: the folder no does not exist; make it first"
    )
    assert fail(run(*given, "base")) == "base: is a folder; give the name of a file"
    result = run(*given, "out.gguf")
    assert result.exit_code == 2
    assert "-o and --report name the same file" in result.stderr
    assert made() == set()
    succeed(run(*given, "r.html"))
    assert made() == {"out.gguf", "r.html"}
    Path("out.gguf").unlink()
    assert fail(run(*given, "r.html")).startswith("r.html: exists already")
    succeed(run(*given, "r.html", "--force"))


def test_force_replaces(run: Run) -> None:
    given = ("merge", "-m", "linear", "a", "b", "-o", "out.gguf")
    Path("out.gguf").write_bytes(b"old")
    message = "out.gguf: exists already; choose another name or give --force"
    assert fail(run(*given)) == message
    assert Path("out.gguf").read_bytes() == b"old"
    succeed(run(*given, "--force"))
    assert Path("out.gguf").read_bytes()[:4] == b"GGUF"


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-m tise a", "unknown merge method 'tise'; did you mean 'ties'?"),
        (
            "-m ties a",
            "ties needs the base that the models were tuned from; give it with --base or base_model",
        ),
        ("-m linear c", "model: no file or folder 'c'; download the model and give its path"),
        ("-m ties --base base a -P density=2", "the parameter density is 2.0; it must be a number"),
        ("-m ties --base base a -P densty=1", "-P has the unknown parameter 'densty'; did you me"),
        ("-m linear a --type Q4", "unknown type 'Q4'; known are F32, F16, BF16, Q8_0, Q6_K,"),
        ("-m linear a --memory lots", "'lots' is no size; write it like 512MiB, 1.5G or 800M"),
        ("-m linear a --memory 1M", "a budget of 1 MiB is too small for this merge; the smallest"),
        ("-m linear a=nan", "the weight of a is nan; it must be a finite number"),
        ("-m linear a=1 b=-1 --threads 1", "the weights of output.weight sum to zero, which"),
        ("-m linear a --preset papr", "unknown preset 'papr'; known are paper, ramp"),
        ("no.yml", "no.yml: cannot read the recipe (No such file or directory); check its path"),
        ("-m linear a -o no/x.gguf", "no/x.gguf: the folder no does not exist; make it first"),
        ("-m linear a -o base", "base: is a folder; give the name of a file"),
        ("-m linear a -o /dev/null --force", "/dev/null: is no regular file; choose another nam"),
    ],
)
def test_one_sentence_and_exit_code_1(run: Run, arguments: str, message: str) -> None:
    assert fail(run("merge", "-o", "out.gguf", *arguments.split())).startswith(message)
    assert made() == set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-m linear -o out.gguf", "Missing argument"),
        ("-m linear a", "Missing option '-o' / '--output'"),
        ("-m linear a -o out.gguf --verbose", "No such option: --verbose"),
        ("-m linear a -o out.gguf --threads 0", "Invalid value for '--threads'"),
        ("-m linear a -o out.gguf --seed -1", "Invalid value for '--seed'"),
        (f"-m linear a -o out.gguf --seed {1 << 64}", "Invalid value for '--seed'"),
        ("-m linear a=x -o out.gguf", "'a=x': the weight 'x' is no number"),
        ("-m linear a -o out.gguf -P density", "-P 'density' must be NAME=VALUE"),
        ("-m linear a -o out.gguf -P density=[1", "the value is no number, word or list"),
        ("-m linear a -o out.gguf -P t=2024-13-45", "the value is no number, word or list"),
        ("-m linear a -o out.gguf -P t=!!bool", "the value is no number, word or list"),
        ("-m linear a -o out.gguf -P t=0.5 -P t=0.9", "one NAME of -P is given twice"),
        ("a b -o out.gguf", "give one RECIPE.yml, or a method with -m and its models"),
        ("r.yml -P density=1 -o out.gguf", "--base and -P go with -m; a recipe file has its own"),
    ],
)
def test_usage_errors_exit_2(run: Run, arguments: str, message: str) -> None:
    result = run("merge", *arguments.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Usage: edgemerge merge [OPTIONS]")
    assert message in " ".join(result.stderr.split())
    assert made() == set()


def change(name: str, change_tensor: Callable[[np.ndarray[Any, Any]], None]) -> str:
    """Copy model a with one tensor of layer 1 changed."""
    shutil.copytree("a", name)
    tensors = load_file(f"{name}/model.safetensors")
    key = "model.layers.1.mlp.down_proj.weight"
    tensors[key] = tensors[key].copy()
    change_tensor(tensors[key])
    save_file(tensors, f"{name}/model.safetensors", {"format": "pt"})
    return name


def test_nan_is_named_with_its_place(run: Run, folder: Path) -> None:
    name = change("nan", lambda tensor: tensor.__setitem__((3, 5), np.nan))
    assert fail(run("merge", "-m", "linear", name, "b", "-o", "out.gguf")) == (
        f"{folder / name}: tensor 'blk.1.ffn_down.weight': holds nan at index {3 * 64 + 5}; "
        "that model is damaged, get it again"
    )
    assert made() == {name}


def test_what_f16_cannot_hold_is_no_silent_infinity(run: Run) -> None:
    name = change("large", lambda tensor: tensor.__setitem__((3, 5), 1e6))
    given = ("merge", "-m", "passthrough", name, "-o", "out.gguf", "-P", "scale=0.5")
    assert fail(run(*given, "--type", "F16")) == (
        "the merged tensor 'blk.1.ffn_down.weight' reaches 500000, which F16 cannot hold; "
        "use --type BF16 or F32, or smaller weights"
    )
    assert made() == {name}
    succeed(run(*given, "--type", "BF16"))


def test_models_of_different_shape_do_not_merge(run: Run, models_dir: Path) -> None:
    other = str(models_dir / "base")
    message = fail(run("merge", "-m", "linear", "a", other, "-o", "out.gguf"))
    assert message.startswith("llama.attention.head_count is 4 in ")
    assert message.endswith("; only fine-tunes of one base can be merged")


def test_an_output_is_never_an_input_nor_its_recipe(run: Run) -> None:
    succeed(run("convert", "a", "-o", "a.gguf"))
    before = Path("a.gguf").read_bytes()
    given = ("merge", "-m", "linear", "a.gguf", "b", "--force", "-o")
    assert fail(run(*given, "a.gguf")) == "a.gguf: is one of the inputs; choose another name"
    recipe = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n"
    Path("recipe.yml").write_text(recipe)
    message = fail(run("merge", "recipe.yml", "-o", "recipe.yml", "--force"))
    assert message == "recipe.yml: is one of the inputs; choose another name"
    assert Path("a.gguf").read_bytes() == before
    assert Path("recipe.yml").read_text() == recipe


def test_a_second_merge_to_the_same_file_waits_for_nobody(run: Run, folder: Path) -> None:
    with OutputFile(folder / "out.gguf", 10):
        message = fail(run("merge", "-m", "linear", "a", "-o", "out.gguf"))
        assert message == "out.gguf: another merge is writing it; wait for that one"
        assert made() == {"out.gguf.part"}
    assert made() == set()


# -- inspect ---------------------------------------------------------------------------------------


def test_inspect_shows_a_model(run: Run, golden_dir: Path) -> None:
    short = succeed(run("inspect", "a"))
    assert short.endswith(" keys of metadata: --all lists them\n")
    assert "general.architecture" not in short
    text = succeed(run("inspect", "a", "--all"))
    assert text.startswith(
        "A  (a)\n"
        "  llama, 22.7 K parameters in 21 tensors, 88.6 KiB, 32.00 bits per parameter\n"
        "  layers 2, width 32, heads 4 (2 for keys and values) of 8, feed-forward 64, context 256\n"
        "  rope freq_base 10000, dimension_count 8\n"
        "  tokenizer llama (default), 64 tokens\n"
        "  special tokens bos 1 <s>, eos 2 </s>\n"
        "  chat template none\n\n"
        "type  tensors  elements    share      size\n"
        "F32        21    22,688  100.0 %  88.6 KiB\n\n"
        "key                                     value\n"
        "general.architecture                    llama\n"
    )


def test_inspect_json_is_the_same_for_a_folder_and_its_gguf(run: Run) -> None:
    succeed(run("convert", "a", "-o", "a.gguf", "--type", "F32"))
    hub = json.loads(succeed(run("inspect", "a", "--json")))
    ours = json.loads(succeed(run("inspect", "a.gguf", "--json")))
    assert ours["metadata"]["edgemerge.method"] == "passthrough"
    differ = {"path", "name", "file_type", "provenance", "losses", "metadata"}
    assert hub.keys() == ours.keys() > differ
    assert {key for key in hub if hub[key] != ours[key]} == differ
    same = {key: value for key, value in ours["metadata"].items() if key in hub["metadata"]}
    assert {**same, "general.name": "A"} == hub["metadata"]


def test_inspect_shows_strange_metadata_without_harm(run: Run) -> None:
    writer = gguf.GGUFWriter("odd.gguf", "llama")
    writer.add_name("two\nlines \x1b[31m")
    writer.add_float32("llama.rope.scale", float("inf"))
    writer.add_array("llama.list", [float("nan")] * 100)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert succeed(run("inspect", "odd.gguf", "--all")).startswith("two lines  [31m  (odd.gguf)\n")
    metadata = json.loads(succeed(run("inspect", "odd.gguf", "--json")))["metadata"]
    assert metadata["llama.rope.scale"] == "inf"
    assert metadata["llama.list"] == {"length": 100, "first": ["nan"] * 4}


def test_inspect_of_no_model(run: Run) -> None:
    assert fail(run("inspect", "no")) == (
        "no: cannot be read (No such file or directory); check the path"
    )
    Path("text").write_text("hello, this is text")
    assert fail(run("inspect", "text")) == (
        "text: is not a GGUF file (it begins with b'hello, t'); give a GGUF file or a model "
        "directory"
    )
