"""What `doctor --bench` measures, and what is kept of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgemerge.cli import make_app
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


@pytest.mark.parametrize("text", ["", "[]", '{"AMD": 1}', "null"])
def test_a_spoilt_file_is_none(kept: Path, text: str) -> None:
    kept.parent.mkdir()
    kept.write_text(text)
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
    refused = runner.invoke(make_app(), plan_words("--board", "pi9"))
    assert refused.exit_code == 2
    assert "pi-zero-2w, pi4, pi5" in refused.output
