"""A level of x86-64 is what NumPy is told to leave alone, and a failure under one is a failure of all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import processors as support
from tools import processors

# NumPy's names since 2.4, on a processor with AVX-512 of Ice Lake's kind.
NEW = {"dispatch": ["X86_V3", "X86_V4", "AVX512_ICL", "AVX512_SPR"]}
NEW["features"] = [*NEW["dispatch"][:3], "X86_V2", "AVX2", "AVX512_SKX"]


@pytest.fixture
def ice_lake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support.numpy_core, "__cpu_dispatch__", NEW["dispatch"])
    monkeypatch.setattr(
        support.numpy_core, "__cpu_features__", dict.fromkeys(NEW["features"], True)
    )


@pytest.mark.usefixtures("ice_lake")
def test_a_level_leaves_alone_what_is_newer_and_there() -> None:
    assert support.levels_here() == ["x86-64-v2", "x86-64-v3", "x86-64-v4"]
    assert support.disabled_features("x86-64-v2") == "X86_V3 X86_V4 AVX512_ICL"
    assert support.disabled_features("x86-64-v3") == "X86_V4 AVX512_ICL"
    assert support.disabled_features("x86-64-v4") == "AVX512_ICL"


def test_numpy_takes_what_it_is_told() -> None:
    code = "from tests.support.processors import levels_here; print(*levels_here())"
    for level in support.levels_here():
        found = subprocess.run(
            [sys.executable, "-c", code],
            cwd=processors.ROOT,
            env={**os.environ, "NPY_DISABLE_CPU_FEATURES": support.disabled_features(level)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert found.stdout.split()[-1] == level
        assert found.stderr == ""


@pytest.mark.usefixtures("ice_lake")
@pytest.mark.parametrize(
    ("failing", "status"), [((), 0), (("x86-64-v2",), 1), (("qemu Haswell",), 1)]
)
def test_the_summary_names_what_ran_and_what_could_not(
    failing: tuple[str, ...],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(name: str, what: str, command: list[str], level: str) -> processors.Row:
        return processors.Row(
            name, what, "FAILED, 1 s" if name in failing else "passed, 1 s: 5 passed"
        )

    monkeypatch.setattr(processors, "run", run)
    monkeypatch.setattr("tools.processors.shutil.which", lambda name: f"/usr/bin/{name}")
    assert processors.main([]) == status
    table = capsys.readouterr().out
    assert "x86-64-v4     tests   not run: make test is this level" in table
    assert "qemu Nehalem  hashes  passed" in table


def test_nothing_to_run_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processors, "levels_here", list)
    assert processors.main([]) == 3
    assert "not shown: this processor does not have it" in capsys.readouterr().out


def test_images_of_a_wheel_would_be_taken_for_the_levels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processors, "PREBUILT", tmp_path)
    assert processors.main([]) == 3
    assert "remove it" in capsys.readouterr().err
