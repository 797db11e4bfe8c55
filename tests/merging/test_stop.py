"""SIGINT and SIGTERM: a quick and quiet end that says how to go on, from the first import on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edgemerge import merge
from edgemerge.formats.gguf.writer import make_layout
from edgemerge.output.file import OutputFile
from edgemerge.output.journal import Journal
from edgemerge.output.parts import OutputParts
from edgemerge.recipe.recipe import make_recipe
from tests.support.fake_source import FakeSource, tensor

COMMAND = [sys.executable, "-m", "edgemerge"]
SCRIPT = [str(Path(sys.executable).with_name("edgemerge"))]
PATIENCE = 5.0  # seconds; a second on a machine that does nothing else


def hear_signals() -> None:
    """Tests may run under nohup, and in the background of a shell."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with two sparse models, x and y."""
    folder = tmp_path_factory.mktemp("sparse")
    extra = [tensor(f"blk.{i}.ffn_up.weight", (1024, 1024), "F32") for i in range(24)]
    source = FakeSource("m", dtype="F32", n_layers=24, extra=extra)
    layout = make_layout(source.metadata(), source.specs().values())
    for name in ("x.gguf", "y.gguf"):
        with (folder / name).open("wb") as file:
            file.write(layout.header)
            file.truncate(layout.n_bytes)
    return folder


MERGE = ["merge", "-m", "ties", "--base", "x.gguf", "y.gguf", "-P", "density=0.5"]
MERGE += ["--type", "Q4_K_M", "--json"]
WARNING = "warning: y.gguf has the base's weights wherever they were compared: it changes nothing\n"


def start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *MERGE, "-o", "out.gguf"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_signals,
    )


@pytest.fixture(scope="module")
def whole(models: Path) -> dict[str, Any]:
    """What the merge tells when nobody stops it."""
    with start(models) as process:
        stdout, _ = process.communicate(timeout=120)
    (models / "out.gguf").unlink()
    document: dict[str, Any] = json.loads(stdout)
    return document


@pytest.mark.parametrize(
    "numbers",
    [[signal.SIGINT], [signal.SIGTERM], [signal.SIGINT] * 3, [signal.SIGTERM, signal.SIGINT]],
    ids=str,
)
def test_a_merge_that_is_stopped_says_how_to_go_on(
    models: Path, whole: dict[str, Any], numbers: list[signal.Signals]
) -> None:
    part = models / "out.gguf.part"
    with start(models) as process:
        while process.poll() is None and not part.exists():
            time.sleep(0.01)
        time.sleep(whole["seconds"] / 3)
        stopped = time.monotonic()
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.02)
        stdout, stderr = process.communicate(timeout=30)
    assert time.monotonic() - stopped < PATIENCE
    # A second signal may come when the first has been answered, and then ends what is left of the process.
    answers = {128 + number for number in numbers} | {-number for number in numbers[1:]}
    assert (
        process.returncode in answers
    )  # Python takes signals that wait in the order of their numbers
    assert stdout == ""
    stderr = stderr.removeprefix(WARNING)  # which comes before the merge starts
    assert "Traceback" not in stderr
    n_finished = 0
    if part.exists():
        found = re.fullmatch(
            r"edgemerge: interrupted; run the same command again to go on after the (\d+) tensors that "
            r"are finished, or delete out\.gguf\.part\n",
            stderr,
        )
        assert found is not None, stderr
        n_finished = int(found[1])
    else:
        assert stderr == "edgemerge: interrupted; nothing was changed\n"
    with start(models) as process:
        stdout, stderr = process.communicate(timeout=120)
    assert stderr == WARNING
    document = json.loads(stdout)
    assert (document["resumed_tensors"], document["damaged_tensors"]) == (n_finished, 0)
    assert document["sha256"] == whole["sha256"]
    assert sorted(os.listdir(models)) == ["out.gguf", "x.gguf", "y.gguf"]
    (models / "out.gguf").unlink()


@pytest.mark.parametrize("command", [COMMAND, SCRIPT], ids=["module", "script"])
def test_ctrl_c_while_the_command_is_imported_is_quiet(tmp_path: Path, command: list[str]) -> None:
    if not Path(command[0]).exists():
        pytest.skip(f"{command[0]} is not installed")
    (tmp_path / "typer.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(5)\n"
    )
    result = subprocess.run(
        [*command, "--help"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=hear_signals,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, "", "")


def test_the_library_leaves_signals_alone() -> None:
    code = "import signal, edgemerge.cli; print(signal.getsignal(2) is signal.default_int_handler)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        preexec_fn=hear_signals,
        timeout=60,
        check=True,
    )
    assert result.stdout == "True\n"


@pytest.mark.parametrize(
    ("owner", "step"),
    [(OutputFile, "reserve"), (Journal, "__init__"), (OutputParts, "open"), (OutputParts, "note")],
)
def test_a_stop_while_the_files_are_made_leaves_none(
    owner: type, step: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = getattr(owner, step)

    def make_and_stop(*arguments: Any, **options: Any) -> None:
        if step != "note":
            make(*arguments, **options)
        os.kill(os.getpid(), signal.SIGTERM)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, step, make_and_stop)
    recipe = make_recipe("linear", [(str(models / f"{name}.gguf"), 0.5) for name in "xy"])
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            merge(recipe, tmp_path / "out.gguf")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert list(tmp_path.iterdir()) == []
