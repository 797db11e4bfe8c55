"""What a control group leaves this process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgemerge.machine.control_group import usable_processors
from edgemerge.merging.run import plan
from edgemerge.recipe.recipe import make_recipe
from tests.runtime.board.boards import lay_out
from tests.support.fixtures import unpacked


@pytest.mark.parametrize(
    ("quota", "usable"), [("max", 8), ("300000", 3), ("250000", 2), ("20000", 1), ("900000", 8)]
)
def test_processors_of_affinity_and_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, usable: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": f"{quota} 100000\n"}
    assert usable_processors(lay_out(tmp_path, files)) == usable


def test_a_merge_heeds_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a container with one of eight processors had eight workers, each with its blocks."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr("edgemerge.machine.control_group.processor_quota", lambda root: 1.5)
    models = [(str(unpacked("models") / name), None) for name in ("expert-a", "expert-b")]
    assert plan(make_recipe("linear", models)).workers == 1
