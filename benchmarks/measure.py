"""Time and memory of a command, and of the machine it ran on."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
USERS_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
# where models are made that are worth keeping
CACHE = Path(os.environ.get("EDGEMERGE_BENCH") or USERS_CACHE / "edgemerge" / "bench")
FIGURES = ROOT / "benchmarks" / "figures"
EDGEMERGE = (sys.executable, "-m", "edgemerge")
CHUNK = 4 << 20  # bytes read at once
BLOCK_BYTES = 512  # unit of the kernel's count of output


@dataclass(frozen=True)
class Cost:
    """What one command took."""

    wall_s: float
    cpu_s: float  # user and system, children included
    peak_rss_mib: float  # of the largest process; Linux starts counting at this process's own
    written_mib: float  # to files, as the kernel counts it: deleted ones too
    output: str


def run(
    command: Sequence[str | Path],
    environment: Mapping[str, str] | None = None,
    *,
    shows_progress: bool = False,
) -> Cost:
    """Run a command to its end; its failure is an error that shows what it printed.

    What it says on stderr is part of the output, or goes to the terminal where it `shows_progress`.
    """
    started = time.monotonic()
    child = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=None if shows_progress else subprocess.STDOUT,
        text=True,
        # Modules are compiled once, as pip does when it installs them.
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "", **(environment or {})},
    )
    assert child.stdout is not None
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.monotonic() - started
    if status:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{output}")
    cpu = usage.ru_utime + usage.ru_stime
    written = usage.ru_oublock * BLOCK_BYTES / 2**20
    return Cost(wall, cpu, usage.ru_maxrss / 1024, written, output)


def figures(cost: Cost) -> dict[str, float]:
    """Return the figures of a cost by name."""
    return {key: value for key, value in vars(cost).items() if key != "output"}


def llama_program(name: str, peers: Path) -> Path:
    """Return llama-server or llama-bench, built in the folder of peers where that was not done before."""
    run([ROOT / "benchmarks" / "make-llama-programs", peers, sys.executable])
    return peers / "llama-programs" / name


# -- merges --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Merge:
    """What to merge: the arguments of `edgemerge merge` but output, memory and threads."""

    arguments: tuple[str, ...]

    @classmethod
    def of(
        cls,
        method: str,
        models: Sequence[Path],
        file_type: str,
        settings: Mapping[str, float | str] = {},
    ) -> Merge:
        """Merge experts, with a weight of 0.5 each, into their base, which is the first model."""
        base, *experts = models
        words = ["-m", method, "--type", file_type, "--base", str(base)]
        words += [f"{expert}=0.5" for expert in experts]
        words += [word for key, value in settings.items() for word in ("-P", f"{key}={value}")]
        return cls(tuple(words))

    def words(self, output: Path, memory: str | None, threads: int | None) -> list[str]:
        """Return all arguments."""
        words = [*self.arguments, "-o", str(output), "--force"]
        words += ["--memory", memory] if memory else []
        return words + (["--threads", str(threads)] if threads else [])

    def run(
        self,
        output: Path,
        *,
        memory: str | None = None,
        threads: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> tuple[Cost, dict[str, Any]]:
        """Merge in a fresh process; the output is removed. Returns the cost and `--json`'s report."""
        words = ["merge", *self.words(output, memory, threads), "--json"]
        cost = run([*EDGEMERGE, *words], environment)
        output.unlink()
        return cost, json.loads(cost.output)

    def profile(self, output: Path, **limits: Any) -> dict[str, Any]:
        """Merge in a fresh process with stopwatches everywhere (tools/profile_merge.py)."""
        environment = limits.pop("environment", None)
        words = self.words(output, limits.get("memory"), limits.get("threads"))
        cost = run(
            [sys.executable, ROOT / "tools" / "profile_merge.py", *words, "--json"], environment
        )
        output.unlink()
        found: dict[str, Any] = json.loads(cost.output)
        return found

    def least_mib(self) -> int:
        """Return the smallest budget that the plan takes, in MiB."""
        words = ["plan", *self.arguments, "--memory", "1MiB"]
        done = subprocess.run([*EDGEMERGE, *words], capture_output=True, text=True, check=False)
        found = re.search(r"--memory (\d+)MiB", done.stderr)
        if not found:
            raise SystemExit(f"edgemerge plan names no smallest budget:\n{done.stderr}")
        return int(found[1])


def make_gguf(work: Path, shape: str, file_type: str, n_experts: int) -> list[Path]:
    """Make a base and experts with tools/make_gguf.py, unless they are there; return them."""
    folder = work / shape
    folder.mkdir(parents=True, exist_ok=True)
    names = ["base", *(f"expert-{i + 1}" for i in range(n_experts))]
    paths = [folder / f"{name}-{file_type}.gguf" for name in names]
    for number, path in enumerate(paths):
        if not path.exists():
            words = ["--shape", shape, "--type", file_type, "--expert", str(number), "--out", path]
            run([sys.executable, ROOT / "tools" / "make_gguf.py", *map(str, words)])
    return paths


def read_in(paths: Iterable[Path]) -> None:
    """Read files once: what is not in the page cache comes into it."""
    buffer = memoryview(bytearray(CHUNK))
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


# -- the machine, and tables -----------------------------------------------------------------------------


def machine() -> dict[str, str]:
    """What the figures depend on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    ).stdout.strip()
    return {
        "cpu": cpu,
        "vectors": f"{_vector_bits(info)} bits",
        "cores": str(len(os.sched_getaffinity(0))),
        "python": platform.python_version(),
        "numba": version("numba"),
        "edgemerge": version("edgemerge"),
        "commit": commit,
    }


def _vector_bits(info: Path) -> int:
    """Width of the vectors that kernels are compiled for here."""
    words = set(info.read_text().split()) if info.exists() else set()
    return 512 if "avx512vl" in words else 256 if "avx2" in words else 128


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def finish(name: str, rendered: str, rows: object, **about: object) -> None:
    """Print what run.py takes: the table, and one JSON object in the last line."""
    print(rendered)
    print(json.dumps({"bench": name, "machine": machine(), **about, "rows": rows}))
