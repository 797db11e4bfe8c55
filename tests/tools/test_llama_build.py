"""How llama.cpp is built: for which machine, with how many compilers at once, and when again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.places import ROOT

LLAMA = ROOT / "tools" / "llama"


def write_program(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(("#!/bin/sh", *lines, "")))
    path.chmod(0o755)
    return path


def run(command: list[str | Path], **environment: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("memory", "processors", "jobs"), [(64 << 30, 5, 5), (4 << 30, 16, 5), (2 << 30, 16, 1)]
)
def test_a_container_has_the_compilers_that_fit_it(
    tmp_path: Path, memory: int, processors: int, jobs: int
) -> None:
    """Fault: in a container of 2 GiB as many ran as the host has processors."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "from edgemerge.machine import control_group\n"
        "os.sysconf = lambda name: 1 << (12 if 'SIZE' in name else 26)\n"
        f"control_group.memory_limits = lambda: iter([(None, {memory})])\n"
        f"control_group.usable_processors = lambda: {processors}\n"
    )
    script = f"set -euo pipefail; python={sys.executable}; . {LLAMA}/common.sh; count_jobs"
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "CMAKE_BUILD_PARALLEL_LEVEL": ""}
    assert run(["bash", "-c", script], **environment) == str(jobs)


def test_a_wheel_for_other_libraries_has_another_name(tmp_path: Path) -> None:
    """Fault: a container that shares the user's cache got a wheel that it cannot import."""
    programs = tmp_path / "programs"
    python = write_program(
        programs / "python",
        'if [ "$1" = -c ]; then echo 4096 2; exit; fi',
        'while [ "$1" != -w ]; do shift; done',
        'touch "$2/llama.whl"',
    )
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "EDGEMERGE_WHEELS": str(tmp_path / "wheels"),
        "CC": str(write_program(programs / "compiler", "echo compiler 12.2.0")),
        "CXX": str(programs / "compiler"),
    }

    def built() -> str:
        return run([LLAMA / "build-wheel", python], **environment)

    write_program(programs / "getconf", "echo glibc 2.36")
    first = built()
    assert first.endswith("/llama.whl")
    assert built() == first
    write_program(programs / "getconf", "echo glibc 2.31")
    second = built()
    write_program(programs / "compiler", "echo compiler 13.1.0")
    assert len({first, second, built()}) == 3


def test_what_shapes_the_wheel_makes_environments_anew() -> None:
    """Fault: .venv kept an older llama.cpp after its version in common.sh was raised."""
    makefile = (ROOT / "Makefile").read_text()
    rule = re.search(r"^\.venv/ready-run:(.*)$", makefile, re.MULTILINE)
    assert rule is not None
    needed = {f"tools/llama/{name}" for name in ("build-wheel", "common.sh", "lean.cmake")}
    assert needed <= set(rule[1].split())
    matrix = (ROOT / "tools" / "matrix").read_text()
    assert "tools/llama/{build-wheel,common.sh,lean.cmake}" in matrix


def test_the_rpc_backend_is_built_for_each_version(tmp_path: Path) -> None:
    """Fault: that of an older llama.cpp was taken for built."""
    libraries = tmp_path / "llama_cpp" / "lib"
    libraries.mkdir(parents=True)
    write_program(tmp_path / "c++", 'while [ "$1" != -o ]; do shift; done', 'touch "$2"')

    def built(version: str) -> str:
        python = write_program(tmp_path / "python", f"echo {version} {libraries}")
        environment = {"CXX": str(tmp_path / "c++"), "EDGEMERGE_LLAMA_SOURCE": str(tmp_path)}
        return run([LLAMA / "build-rpc", python], **environment)

    for version in ("0.3.36", "0.3.37", "0.3.37"):
        assert built(version) == f"{libraries}/libggml-rpc.so.{version}"
        assert [path.name for path in libraries.iterdir()] == [f"libggml-rpc.so.{version}"]
    (libraries / "libggml-rpc.so").touch()  # of a wheel
    assert built("0.3.37") == f"{libraries}/libggml-rpc.so"
