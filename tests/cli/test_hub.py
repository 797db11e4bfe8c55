"""`org/name` on the command line, against a hub on this machine."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.local_hub import COMMIT, LocalHub, serve_hub
from tests.support.small_models import stored

pytest.importorskip("huggingface_hub")


class Desk:
    """Where commands run: a folder, a cache and a hub."""

    def __init__(self, folder: Path, hub: LocalHub) -> None:
        self.folder, self.hub = folder, hub
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(folder / "home"),
        }

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "edgemerge", *words],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def answer(self, text: bytes, *words: str, stops: bool = False) -> tuple[int, str]:
        """Run a command at a terminal, where somebody types a text; return its code and what is seen.

        `stops`: at the question it gets what Ctrl-C sends.
        """
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "edgemerge", *words],
            cwd=self.folder,
            env=self.environment,
            stdin=theirs,
            stdout=subprocess.DEVNULL,
            stderr=theirs,
        )
        os.close(theirs)
        os.write(ours, text)
        seen = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # the terminal is closed
                break
            if not piece:
                break
            seen += piece
            if stops and b"[y/N]" in seen:
                process.send_signal(signal.SIGINT)
                stops = False
        os.close(ours)
        return process.wait(), seen.decode()


@pytest.fixture(name="desk")
def _desk(tmp_path: Path, models_dir: Path) -> Iterator[Desk]:
    with serve_hub() as hub:
        hub.add("ward/expert-a", models_dir / "expert-a")
        yield Desk(tmp_path, hub)


def test_a_merge_fetches_a_model_and_records_its_commit(desk: Desk, models_dir: Path) -> None:
    other = str(models_dir / "expert-b")
    words = ("merge", "-m", "linear", other, "--no-ask", "--type", "F16", "--json")
    refused = desk.run(*words, "ward/expert-a", "-o", "hub.gguf")
    assert refused.returncode == 1
    assert refused.stderr == (
        "edgemerge: model: no file or folder 'ward/expert-a', and the hub's cache has no whole model of "
        "that name; give --download to fetch it, or run: hf download ward/expert-a\n"
    )
    made = desk.run(*words, "ward/expert-a", "-o", "hub.gguf", "--download")
    assert (made.returncode, made.stderr) == (0, "")
    found = json.loads(made.stdout)["inputs"][1]
    assert (found["name"], found["hub"]) == ("expert-a", f"ward/expert-a@{COMMIT}")
    desk.run(*words, str(models_dir / "expert-a"), "-o", "local.gguf")
    assert stored(desk.folder / "hub.gguf") == stored(desk.folder / "local.gguf")
    desk.hub.requests.clear()
    checked = desk.run("verify", "hub.gguf", "--input", other, "--input", "ward/expert-a")
    assert f"as the given model's, of the hub: ward/expert-a@{COMMIT}" in checked.stdout
    planned = desk.run("plan", *words[1:4], "ward/expert-a").stdout
    assert COMMIT not in "".join(line for line in planned.splitlines() if "snapshots" not in line)
    assert desk.hub.requests == []


def test_a_yes_at_a_terminal_fetches(desk: Desk) -> None:
    code, seen = desk.answer(b"n\n", "inspect", "ward/expert-a")
    assert code == 1
    assert "ward/expert-a is not on this machine. Fetch it from the hub? [y/N]" in seen
    assert desk.hub.requests == []
    code, _ = desk.answer(b"y\n", "inspect", "ward/expert-a")
    assert code == 0
    assert "model.safetensors" in desk.hub.fetched()


def test_ctrl_c_at_the_question_is_an_interrupt(desk: Desk) -> None:
    code, seen = desk.answer(b"", "inspect", "ward/expert-a", stops=True)
    assert code == 130
    assert seen.splitlines()[-1] == "edgemerge: interrupted; nothing was changed"
    code, seen = desk.answer(b"\x04", "inspect", "ward/expert-a")  # Ctrl-D: no answer
    assert code == 1
    assert "give --download to fetch it" in seen


def test_a_folder_that_is_none_is_refused(desk: Desk) -> None:
    refused = desk.run("inspect", "ward/expert-a", "--models", "absent")
    assert refused.returncode == 2
    assert "there is no such folder" in refused.stderr


def test_extract_and_publish_find_models_too(desk: Desk, models_dir: Path) -> None:
    pytest.importorskip("tuf")
    words = (str(models_dir / "base"), "ward/expert-a", "--rank", "1", "-o", "a.gguf")
    made = desk.run("extract", *words, "--download")
    assert (made.returncode, made.stderr) == (0, "")
    assert desk.run("keygen", "own").returncode == 0
    own = ("--key", "own.pem", "--state", "state")
    assert desk.run("publish", "r", "--init", "--root-key", "own.pem", *own).returncode == 0
    file = ("publish", "r", "a.gguf", "--name", "a", "--version", "1", *own)
    published = desk.run(*file, "--base", "ward/expert-a", "--json")
    assert (published.returncode, published.stderr) == (0, "")
    assert json.loads(published.stdout)["entry"]["base"]
    refused = desk.run("publish", "r", "--refresh", "--download", *own)
    assert refused.returncode == 2
    assert "--download belongs to FILE" in refused.stderr
