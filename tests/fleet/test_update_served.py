"""Updates of real small models beside a running server, from the command line."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

pytest.importorskip("llama_cpp")

from edgemerge.merging.run import merge
from edgemerge.recipe.recipe import make_recipe
from edgemerge.site.log import read_events
from tests.support.serving import Serving
from tests.support.small_models import edit_hub
from tests.support.updates import folder_of, write_site

pytestmark = pytest.mark.llama

N_QUESTIONS = 50
ASK = {"prompt": "Question: What is", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def prepared(
    tmp_path_factory: pytest.TempPathFactory, models_dir: Path, eval_dir: Path
) -> tuple[Path, dict[str, Any]]:
    """A device that serves half of an expert's change; beside it the expert, and its opposite."""
    folder = tmp_path_factory.mktemp("device")
    base = load_file(models_dir / "base" / "model.safetensors")

    def turn_round(name: str, tensor: Any) -> Any:
        return (2 * base[name].astype(np.float32) - tensor).astype(tensor.dtype)

    sources = {name: models_dir / name for name in ("base", "expert-a")}
    sources["opposite"] = edit_hub(models_dir / "expert-a", folder / "opposite", turn_round)
    for name, source in sources.items():
        recipe = make_recipe("passthrough", [(str(source), None)], out_type="F16")
        merge(recipe, folder / f"{name}.gguf")
    for name in ("disease", "general"):
        lines = (eval_dir / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:N_QUESTIONS]))
    questions = [json.loads(line)["question"] for line in lines]
    (folder / "notes.txt").write_text("\n".join(questions))
    first = run(declare(folder, "expert-a", 0.3, better=[], texts={"notes": "notes.txt"}))
    assert first["outcome"] == "promoted", first["reason"]
    return folder, first


@pytest.fixture
def device(prepared: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    shutil.copytree(prepared[0], tmp_path / "device", symlinks=True)
    return tmp_path / "device" / "SITE.yml"


def declare(
    folder: Path,
    expert: str,
    scale: float,
    *,
    better: Sequence[str] = ("disease",),
    watch: float = 2,
    **more: Any,
) -> Path:
    return write_site(
        folder,
        experts=[{"path": f"{expert}.gguf"}],
        merge={"method": "task_arithmetic", "parameters": {"lambda": scale}, "type": "F16"},
        promote={"margin": 25, "better": list(better), "watch": watch, "slowdown": 50},
        threads=1,
        **more,
    )


def run(path: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "edgemerge", "update", str(path), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    good = told["outcome"] in ("promoted", "refused", "unchanged")
    assert done.returncode == (0 if good else 1)
    return told


def test_texts_are_read_in_the_context_that_both_models_have(
    device: Path, prepared: tuple[Path, dict[str, Any]]
) -> None:
    assert prepared[1]["current"]["perplexities"].keys() == {"notes"}
    kept = [json.loads(path.read_text()) for path in folder_of(device).answers.iterdir()]
    assert [one["chunk"] for one in kept] == [256] * len(kept)
    n_scored = {chunk[2] for one in kept for chunk in one["chunks"]["notes"]}
    assert n_scored == {127}


def test_a_server_of_another_file_is_told(device: Path) -> None:
    other, current = device.parent / "expert-a.gguf", folder_of(device).current_path
    with Serving(other) as server:
        declare(device.parent, "expert-a", 1.0, serve={"address": server.url})
        report = run(device)
    assert (report["outcome"], report["tried"]) == ("failed", None)
    assert f"serves another file than {current}" in report["reason"]
    assert report["seconds"].keys() == {"find"}


def fingerprint(server: Serving) -> str | None:
    found: str | None = server.health()["models"][0]["fingerprint"]
    return found


def test_a_good_expert_is_promoted_a_bad_one_is_not(
    device: Path, prepared: tuple[Path, dict[str, Any]]
) -> None:
    first = prepared[1]["current"]
    with Serving(folder_of(device).current_path, key="secret") as server:
        (device.parent / "key").write_text("secret\n")
        place = {"address": server.url, "key": "key"}
        before = fingerprint(server)
        bad = run(declare(device.parent, "opposite", 1.0, serve=place))
        assert bad["outcome"] == "refused"
        assert "disease not better for certain" in bad["reason"]
        assert fingerprint(server) == before
        good = run(declare(device.parent, "expert-a", 1.0, serve=place))
        assert good["outcome"] == "promoted", good["reason"]
        assert good["failures"] == []
        assert fingerprint(server) != before
        assert good["current"] == good["tried"]
        assert good["current"]["scores"]["disease"]["right"] > first["scores"]["disease"]["right"]
        command = [sys.executable, "-m", "edgemerge", "rollback", str(device), "--reason", "odd"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.startswith("ward-3: rolled back\n  odd\n")
        assert fingerprint(server) == before
    assert folder_of(device).current_id() == first["id"]
    assert run(device)["outcome"] == "unchanged"


@contextlib.contextmanager
def crashing(server: Serving, device: Path, old: str | None) -> Iterator[None]:
    """End each process of a model that is not the old one, as an assertion of llama.cpp does."""
    ends = threading.Event()
    serves = folder_of(device).current_id()

    def end_processes() -> None:
        while not ends.wait(0.05):
            new = folder_of(device).current_id()
            if new == serves or fingerprint(server) in (old, None):
                continue  # the roll back loads the old one beside it
            tasks = Path(f"/proc/{server.process.pid}/task").glob("*/children")
            for pid in " ".join(path.read_text() for path in tasks).split():
                with contextlib.suppress(OSError):  # it has ended meanwhile
                    maps = Path(f"/proc/{pid}/maps").read_text()
                    if f"/models/{new}.gguf" in maps:
                        os.kill(int(pid), signal.SIGABRT)

    thread = threading.Thread(target=end_processes)
    thread.start()
    try:
        yield
    finally:
        ends.set()
        thread.join()


@contextlib.contextmanager
def asking(server: Serving) -> Iterator[list[tuple[float, int]]]:
    """Ask all the time; yields when there was an answer of which status."""
    ends, statuses = threading.Event(), list[tuple[float, int]]()

    def ask() -> None:
        while not ends.wait(0.05):
            status = server.post("/v1/completions", ASK).status
            statuses.append((time.time(), status))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield statuses
    finally:
        ends.set()
        thread.join()


def test_a_model_that_crashes_once_it_serves_is_rolled_back(device: Path) -> None:
    with Serving(folder_of(device).current_path) as server:
        old, serves = fingerprint(server), folder_of(device).current_id()
        declare(device.parent, "expert-a", 1.0, watch=25, serve={"address": server.url})
        with asking(server) as statuses, crashing(server, device, old):
            report = run(device)
            time.sleep(0.5)
        assert report["outcome"] == "rolled_back", report
        assert "llama.cpp ended" in report["reason"] or "does not answer" in report["reason"]
        assert (folder_of(device).current_id(), fingerprint(server)) == (serves, old), report
        assert {status for _, status in statuses} <= {200, 503}  # a quick restart may show no 503
        last_503 = max((when for when, status in statuses if status == 503), default=0.0)
        assert any(status == 200 for when, status in statuses if when > last_503)
    assert report["seconds"]["watch"] + report["seconds"]["roll_back"] < 30
    events = [one["event"] for one in read_events(folder_of(device).path / "log.jsonl")]
    assert events[-3:] == ["promoted", "rolled_back", "finished"]
