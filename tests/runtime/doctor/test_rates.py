"""What `doctor --bench` measures, and what is kept of it."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from edgemerge.cli import make_app
from edgemerge.errors import OutputError
from edgemerge.planning.boards import BOARDS
from edgemerge.runtime.board.storage import Disk, Storage
from edgemerge.runtime.doctor import rates
from tests.support.fixtures import unpacked


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where rates are kept; kernels are measured for a moment only."""
    path = tmp_path / "cache" / "rates.json"
    monkeypatch.setattr(rates, "_path", lambda: path)
    monkeypatch.setattr(rates, "_SECONDS", 0.01)
    return path


def plan_words(*more: str) -> list[str]:
    models = unpacked("models")
    experts = [str(models / name) for name in ("expert-a", "expert-b")]
    return ["plan", "-m", "ties", "--base", str(models / "base"), *experts, *more]


def test_plan_predicts_what_was_measured(kept: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    assert "time on" not in runner.invoke(make_app(), plan_words()).output
    shown = runner.invoke(make_app(), ["doctor", "--bench", "--storage", str(tmp_path), "--json"])
    found = json.loads(shown.stdout)["rates"]
    assert (
        min(found[name] for name in ("decode", "encode", "merge", "python", "copied", "hashed")) > 0
    )
    measured = rates.kept_rates()
    assert measured is not None
    assert (measured.decode, measured.read) == (found["decode"], found["read"])
    lines = runner.invoke(make_app(), plan_words()).stdout.splitlines()
    assert any(line.startswith("time on this machine: about ") for line in lines)
    document = json.loads(runner.invoke(make_app(), plan_words("--json")).stdout)
    told = document["prediction"]
    assert told["machine"] == "this machine"
    assert told["least_seconds"] <= told["seconds"] <= told["most_seconds"]


def test_what_was_free_then_bounds_no_plan_now(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: after `doctor --bench` on a busy machine, `plan` failed where `merge` had 512 MiB."""
    rates._keep(replace(BOARDS["pi5"], name="this machine", memory=60 << 20))
    document = json.loads(CliRunner().invoke(make_app(), plan_words("--json")).stdout)
    assert document["budget_bytes"] == 512 << 20
    measured = rates.kept_rates()
    assert measured is not None
    assert measured.memory > 60 << 20


@pytest.mark.parametrize("kind", ["SD card", "memory"])
def test_storage_that_was_not_measured(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Fault: a full card counted as fast as memory."""
    full = Storage(tmp_path, Disk("disk", kind), 0, problem="too little room to measure")
    monkeypatch.setattr(rates, "measure_storage", lambda folder: full)
    found = rates.measure_rates(tmp_path)
    known = kind == "memory"
    assert (found.read, found.written) == ((found.copied,) * 2 if known else (None, None))
    measured = rates.kept_rates()
    assert measured is not None
    assert measured == replace(found, memory=measured.memory)
    shown = CliRunner().invoke(make_app(), plan_words()).stdout
    assert ("storage not known; " in shown) != known
    assert ("could not measure the storage, so its time is not counted" in shown) != known
    told = json.loads(CliRunner().invoke(make_app(), plan_words("--json")).stdout)["prediction"]
    assert (told["storage_seconds"] is None) != known


def test_all_threads_copy_at_once(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: what one core copies was taken for what all do."""
    both = threading.Barrier(2, timeout=10)

    def copy(target: Any, source: Any) -> None:
        both.wait()

    monkeypatch.setattr(np, "copyto", copy)
    assert rates._copy(2) > 0


def test_cores_are_those_that_the_quota_leaves(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "usable_processors", lambda: 3)
    assert rates.measure_rates(tmp_path).cores == 3
    assert ", 3 threads" in kept.read_text()


@pytest.mark.parametrize("text", ["", "[]", '{"AMD": 1}', "null"])
def test_a_spoilt_file_is_none(kept: Path, text: str) -> None:
    kept.parent.mkdir()
    kept.write_text(text)
    assert rates.kept_rates() is None


def test_without_a_cache_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: `plan` failed for a user without a home whose folder in /tmp was somebody else's."""

    def refuse() -> Path:
        raise OutputError("this user has no home", path=Path("/tmp/edgemerge-0"))

    monkeypatch.setattr(rates, "users_cache", refuse)
    rates._keep(replace(BOARDS["pi5"], name="this machine"))
    assert rates.kept_rates() is None


def test_a_named_board(kept: Path) -> None:
    runner = CliRunner()
    shown = runner.invoke(make_app(), plan_words("--board", "pi-zero-2w", "--json"))
    document = json.loads(shown.stdout)
    assert document["budget_bytes"] == 330 << 20
    assert document["workers"] == 4
    assert document["prediction"]["machine"].startswith("Raspberry Pi Zero 2 W")
    small = runner.invoke(make_app(), plan_words("--board", "pi-zero-2w", "--memory", "2GiB"))
    assert "with 4 of 4 cores" in small.stdout
    assert " of 330 MiB: " in small.stdout  # it was planned with 2 GiB
    refused = runner.invoke(make_app(), plan_words("--board", "pi9"))
    assert refused.exit_code == 2
    assert "pi-zero-2w, pi4, pi5" in refused.output
