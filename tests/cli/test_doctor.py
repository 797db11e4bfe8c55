"""`edgemerge doctor`, as a user sees it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from edgemerge.cli import doctor as command
from edgemerge.merging import precompile as warm
from edgemerge.runtime.doctor import diagnosis
from tests.runtime.board import boards
from tests.support.tiny_gguf import write_tiny_gguf

Run = Callable[..., Result]
SECTIONS = ["board", "system", "software", "memory that models take", "advice"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    app = typer.Typer(rich_markup_mode=None)
    app.command("doctor")(command.doctor_command)
    return lambda *arguments: CliRunner().invoke(app, list(arguments), prog_name="doctor")


@pytest.fixture
def on_a_pi(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command examine a Raspberry Pi 5 with too weak a power supply."""
    root = boards.raspberry_pi_5(tmp_path_factory.mktemp("root"), "50005")
    examine = diagnosis.examine
    monkeypatch.setattr(diagnosis, "examine", lambda folder, model: examine(folder, model, root))
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})


def titles(output: str) -> list[str]:
    """Lines that nothing indents."""
    return [line for line in output.splitlines() if line and not line.startswith(" ")]


def row(output: str, name: str) -> str:
    """Value of a named line."""
    lines = [line for line in output.splitlines() if line.startswith(f"  {name} ")]
    assert len(lines) == 1, output
    return lines[0].removeprefix(f"  {name} ").strip()


def test_sections_on_this_machine(run: Run) -> None:
    result = run()
    assert (result.exit_code, result.stderr) == (0, "")
    shown = titles(result.stdout)
    assert all(line.startswith(title) for line, title in zip(shown, SECTIONS, strict=False))


@pytest.mark.usefixtures("on_a_pi")
def test_a_raspberry_pi(run: Run) -> None:
    output = run().stdout
    assert row(output, "name") == "Raspberry Pi 5 Model B Rev 1.0"
    assert row(output, "cores") == "4 cores, up to 2.40 GHz"
    assert row(output, "memory") == "8 GiB, 7 GiB free"
    assert row(output, "swap") == "512 MiB on SD card (/var/swap)"
    assert row(output, "temperature") == "62 °C"
    assert row(output, "throttling") == "under-voltage, throttled"
    assert row(output, "power").startswith("2.6 W (Pi 5 PMIC: ")
    assert row(output, "Llama-3.1-8B").split("  ")[0] == "5.26 GiB fits"
    assert titles(output)[-1] == "warnings"
    assert "  !  the voltage is too low: " in output


@pytest.mark.usefixtures("on_a_pi")
def test_json_is_one_object(run: Run) -> None:
    document = json.loads(run("--json").stdout)
    assert document["board"]["name"] == "Raspberry Pi 5 Model B Rev 1.0"
    assert document["threads"] is None or document["threads"]["prompt"] >= 1
    assert document["warnings"][0].startswith("the voltage is too low")


def test_a_model_and_another_storage(run: Run, tmp_path: Path) -> None:
    model = write_tiny_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "disk").mkdir()
    output = run("--model", str(model), "--storage", "disk").stdout
    assert row(output, "file") == str(model)
    assert row(output, "fits").startswith("with all 256 tokens of context: ")
    assert row(output, "serve").startswith("8 requests at a time (--parallel), 256 tokens for one")
    assert f"{tmp_path}/disk" in row(output, "storage")
    assert "-  serve reads prompts 256 tokens at a time: " in output


def test_what_serve_keeps_where_memory_is_short(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr("edgemerge.runtime.serve.models.usable_memory", lambda floor: floor)
    assert "256 for all, as many as fit: " in row(run("--model", str(model)).stdout, "serve")


@pytest.mark.usefixtures("on_a_pi")
def test_a_model_that_is_too_large(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    for process_bytes, name in ((8 << 30, "too large"), (int(6.5 * 2**30), "tight")):
        monkeypatch.setattr("edgemerge.runtime.doctor.fit.PROCESS_BYTES", process_bytes)
        assert "7 GiB" in row(run("--model", "tiny.gguf").stdout, name)


def test_a_model_that_is_none(run: Run, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_text("hello")
    result = run("--model", "x.gguf")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("edgemerge: x.gguf: ")


def test_a_storage_that_is_no_folder(run: Run) -> None:
    result = run("--storage", "nowhere")
    assert result.exit_code == 2
    assert "nowhere is no folder" in result.stderr


def test_without_llama_cpp(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgemerge.runtime.library import load_library

    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    load_library.cache_clear()
    try:
        result = run()
    finally:
        load_library.cache_clear()
    assert result.exit_code == 0
    assert row(result.stdout, "llama.cpp") == (
        "running a model needs llama.cpp: install it with pip install 'edgemerge[run]'"
    )


def test_warm_compiles_what_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: set[str] = set()
    monkeypatch.setattr(warm, "compile_missing", compiled.update)
    monkeypatch.setattr(warm, "find_missing", lambda names: sorted(set(names) - compiled))
    cold = json.loads(run("--json").stdout)["kernels"]
    assert len(cold["cold"]) == cold["total"]
    assert "0 of" in row(run().stdout, "kernels")
    assert not compiled

    assert row(run("--compile").stdout, "kernels").endswith("all compiled")
    assert compiled >= {"ties.elect", "q4_k.encode_q4_k", "weighted_affine.search_affine"}
    assert json.loads(run("--compile", "--json").stdout)["kernels"]["cold"] == []
