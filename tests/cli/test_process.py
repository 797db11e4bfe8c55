"""The command as a process: exit codes, signals, pipes, full disks."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edgemerge.formats.gguf.writer import make_layout
from tests.support.fake_source import FakeSource, tensor

COMMAND = [sys.executable, "-m", "edgemerge"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden_dir: Path) -> Path:
    """Working directory with the golden models under their names."""
    for name in ("base", "a", "b"):
        (tmp_path / name).symlink_to(golden_dir / "inputs_f32" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    given = {"capture_output": True, "text": True, "timeout": 60, "check": False, **options}
    return subprocess.run([*COMMAND, *arguments], **given)


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """Run a line of shell in which $E is the command."""
    environment = {**os.environ, "E": " ".join(COMMAND)}
    return subprocess.run(
        ["bash", "-c", line],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def made() -> set[str]:
    return set(os.listdir()) - {"base", "a", "b"}


def write_sparse(path: Path) -> str:
    """Write a model of zeros that is long to merge and takes no room on disk."""
    large = tensor("output.weight", (64_000, 1024), "F32")
    source = FakeSource(path, dtype="F32", extra=[large])
    layout = make_layout(source.metadata(), source.specs().values())
    with path.open("wb") as file:
        file.write(layout.header)
        file.truncate(layout.n_bytes)
    return path.name


@pytest.mark.parametrize(
    ("arguments", "code", "stderr"),
    [
        ("merge -m linear a b -o out.gguf", 0, ""),
        ("merge -m linear a c -o out.gguf", 1, "edgemerge: model: no file or folder 'c'; "),
        ("merge -m linear a b", 2, "Usage: python -m edgemerge merge [OPTIONS] "),
        ("mrege", 2, "Usage: python -m edgemerge [OPTIONS] COMMAND [ARGS]..."),
        ("--version", 0, ""),
    ],
)
def test_exit_codes(arguments: str, code: int, stderr: str) -> None:
    result = run(*arguments.split())
    assert result.returncode == code
    assert result.stderr.startswith(stderr)
    assert bool(result.stderr) == bool(stderr)
    assert "Traceback" not in result.stderr
    assert made() == ({"out.gguf"} if "-o" in arguments and code == 0 else set())


def test_json_is_alone_on_stdout_whatever_the_encoding(folder: Path) -> None:
    (folder / "grün").symlink_to(folder / "a")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    given = ("merge", "-m", "passthrough", "grün", "-o", "größe.gguf", "--json")
    result = run(*given, env=environment)
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["output"] == "größe.gguf"
    result = run("inspect", "größe.gguf", env=environment)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("a  (gr\\xf6\\xdfe.gguf)\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_merge_that_is_stopped_says_what_it_leaves(folder: Path, number: signal.Signals) -> None:
    models = [write_sparse(folder / f"{name}.gguf") for name in ("x", "y", "z")]
    given = ("merge", "-m", "della", "--base", *models, "-P", "density=0.5", "-o", "out.gguf")
    part = folder / "out.gguf.part"
    with subprocess.Popen(
        [*COMMAND, *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # tests may run under nohup
    ) as process:
        while process.poll() is None and not (part.exists() and part.stat().st_size):
            time.sleep(0.01)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (128 + number, "")
    if "go on after" in stderr:  # a small tensor was finished already
        assert made() == {*models, "out.gguf.part", "out.gguf.part.journal"}
    else:
        assert stderr.endswith("edgemerge: interrupted; nothing was changed\n")
        assert made() == set(models)


def test_nohup_still_protects() -> None:
    result = shell("trap '' HUP; $E merge -m linear a -o out.gguf & kill -HUP $!; wait $!")
    assert result.returncode == 0
    assert made() == {"out.gguf"}


def test_a_reader_that_goes_away_is_no_error_worth_a_word() -> None:
    result = shell("$E plan -m linear a b --json | head -c 1; echo ${PIPESTATUS[1]}")
    assert (result.stdout, result.stderr) == ("{0\n", "")
    result = shell("$E inspect a | true")
    assert (result.stdout, result.stderr) == ("", "")


def test_closed_streams_are_no_error() -> None:
    result = shell("$E merge -m linear a b -o out.gguf >&- 2>&-")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert made() == {"out.gguf"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_stdout_is_told() -> None:
    result = shell("$E inspect a >/dev/full")
    assert (result.returncode, result.stderr) == (1, "edgemerge: No space left on device\n")


def test_no_room_for_the_output_is_told_and_leaves_nothing() -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))

    result = run("merge", "-m", "linear", "a", "b", "-o", "out.gguf", preexec_fn=limit)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        "edgemerge: out.gguf: needs 48.8 KiB, which cannot be had there (File too large)\n"
    )
    assert made() == set()
