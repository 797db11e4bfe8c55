"""What the terminal shows of each part of the work, seen through a pseudo-terminal."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from edgemerge.cli import progress
from edgemerge.merging.run import merge
from edgemerge.recipe.recipe import load_recipe
from tests.support.places import ROOT

Run = Callable[..., str]
ALIGNED = """\
merge_method: linear
models:
- model: a
  parameters: {weight: 0.5}
- model: b
  parameters: {weight: 0.5}
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden_dir: Path) -> Run:
    """Runs a command in a folder with two models, and returns what its stderr, a terminal, got."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        Path(name).symlink_to(golden_dir / "inputs_f32" / name)
    Path("recipe.yml").write_text(ALIGNED)

    def on_terminal(*arguments: str) -> str:
        master, slave = pty.openpty()
        shown: list[bytes] = []
        reader = threading.Thread(target=lambda: shown.extend(iter(lambda: _read(master), b"")))
        reader.start()
        command = [sys.executable, "-m", "edgemerge", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        environment |= {"TERM": "xterm"}
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=slave, env=environment, check=False
        )
        os.close(slave)
        reader.join()
        os.close(master)
        text = b"".join(shown).decode()
        assert done.returncode == 0, text
        return text

    return on_terminal


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # Linux: the other end is closed
        return b""


def test_a_merge_shows_its_parts(run: Run) -> None:
    text = run("merge", "recipe.yml", "-o", "out.gguf", "--align", "hard", "--neurons")
    parts = ("linear -> out.gguf", "aligning heads", "matching neurons of b", "hashing the output")
    assert [text.count(part) > 0 for part in parts] == [True] * 4, text
    assert "checking what is finished" not in text
    assert "0/? layers" in text


def test_a_merge_that_goes_on_shows_what_it_checks(run: Run) -> None:
    def stop(done: int, _total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(load_recipe("recipe.yml"), "out.gguf", threads=1, progress=stop)
    assert Path("out.gguf.part").is_file()
    assert "checking what is finished" in run("merge", "recipe.yml", "-o", "out.gguf")


def test_signing_and_verifying_show_what_they_read(run: Run) -> None:
    run("merge", "recipe.yml", "-o", "out.gguf")
    run("keygen", "key")
    assert "sign out.gguf" in run("sign", "out.gguf", "--key", "key.pem")
    inputs = ("--input", "a", "--input", "b")
    text = run("verify", "out.gguf", "--key", "key.pub.pem", *inputs)
    for part in ("signature of out.gguf", "verify out.gguf", "reading the inputs"):
        assert part in text


def test_align_shows_what_it_reads(run: Run) -> None:
    assert "align b" in run("align", "a", "b")


def test_json_and_pipes_show_nothing(run: Run) -> None:
    assert run("merge", "recipe.yml", "-o", "out.gguf", "--json") == ""
    command = [sys.executable, "-m", "edgemerge", "verify", "out.gguf"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, env=environment, check=True)
    assert done.stderr == b""


def test_bytes_and_their_rate_stay_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    console = Console(file=shown, width=80, force_terminal=True, legacy_windows=False)
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    with progress.show_bars("task_arithmetic -> asked.gguf", None, lambda: None) as bars:
        for show in (bars.whole, bars.begin("hashing the output")):
            for done in range(1, 5):
                show(done * 96_500_000, 386_000_000)
                time.sleep(0.15)
    rates = [line for line in shown.getvalue().splitlines() if "MB/s" in line or "GB/s" in line]
    assert rates
    assert all("/368.1 MiB" in line for line in rates)
