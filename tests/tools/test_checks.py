"""Hosted checks, hooks and `make check` are the same checks."""

from __future__ import annotations

import subprocess
import tomllib
from typing import Any

import yaml

from tests.support.places import ROOT


def read_yaml(path: str) -> dict[str, Any]:
    found = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def check(*names: str) -> subprocess.CompletedProcess[str]:
    command = ["tools/check", *names]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_supported_python_is_checked_on_both_machines() -> None:
    job = read_yaml(".github/workflows/ci.yml")["jobs"]["run"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    stated = [c.rpartition(" :: ")[2] for c in project["classifiers"] if ":: 3." in c]
    assert job["strategy"]["matrix"]["python"] == stated
    assert job["strategy"]["matrix"]["machine"] == ["ubuntu-24.04", "ubuntu-24.04-arm"]
    assert job["steps"][-1]["run"] == ".ci/run"
    assert list(job["steps"][-1]["env"]) == ["PYTHON"]


def test_hooks_are_the_quick_checks() -> None:
    (repository,) = read_yaml(".pre-commit-config.yaml")["repos"]
    hooks = repository["hooks"]
    assert [hook["entry"] for hook in hooks] == [f"tools/check {hook['id']}" for hook in hooks]
    usage = check("nothing")
    assert usage.returncode == 2
    assert usage.stderr.strip().endswith(f"one of {', '.join(hook['id'] for hook in hooks)}")


def test_one_check_runs_alone() -> None:
    assert check("lint").stdout.splitlines()[0] == "== .venv/bin/ruff check ."
