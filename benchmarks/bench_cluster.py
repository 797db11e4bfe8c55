"""A merge by the threads of one process, and by Dask workers on the same machine: what does the way cost?

    benchmarks/bench_cluster.py [--shape llama-160m] [--repeats N] [--work FOLDER]

The same merge runs in turns: by threads, by processes that `--cluster local:N` starts, by two workers of a
scheduler. These write the output in place, then send it back, for which a mount hides the output's folder
from them (root only). Of some runs the fastest counts. Seconds are those of the merge, without the start of
Dask; all outputs must have the same SHA-256.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measure import CACHE, EDGEMERGE, Merge, finish, make_gguf, read_in, table

METHODS: dict[str, dict[str, float]] = {"task_arithmetic": {}, "ties": {"density": 0.5}}
FILE_TYPE = "Q4_K_M"
HIDDEN = 'mount -t tmpfs none "$0" && exec "$@"'
START_SECONDS = 20.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=CACHE)
    parser.add_argument("--shape", default="llama-160m")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    models = make_gguf(options.work, options.shape, FILE_TYPE, 2)
    read_in(models)
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        folder = Path(name)
        with dask(folder, hides=False) as seeing, dask(folder, hides=True) as blind:
            ways = {
                "threads of one process": [],
                "local:1, 2 threads": ["--cluster", "local:1"],
                "local:2": ["--cluster", "local:2"],
                "2 workers, in place": ["--cluster", seeing],
                **({"2 workers, sent back": ["--cluster", blind]} if blind else {}),
            }
            rows = [
                row
                for method, settings in METHODS.items()
                for row in measure(method, settings, models, folder, ways, options.repeats)
            ]
    finish("cluster", render(rows), rows, shape=options.shape)


def measure(
    method: str,
    settings: dict[str, float],
    models: Sequence[Path],
    folder: Path,
    ways: dict[str, list[str]],
    repeats: int,
) -> list[dict[str, Any]]:
    """Merge in all ways in turns; return the fastest run of each."""
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    merge = Merge.of(method, models, FILE_TYPE, settings)
    for _ in range(repeats):
        for way, words in ways.items():
            _, report = Merge((*merge.arguments, *words)).run(folder / "out.gguf", threads=2)
            found[way].append(report)
            print(f"  {method}, {way}: {report['seconds']:.2f} s", file=sys.stderr)
    hashes = {report["sha256"] for reports in found.values() for report in reports}
    if len(hashes) > 1:
        raise SystemExit(f"{method}: the outputs differ")
    return [
        {"method": method, "way": way, **min(reports, key=lambda report: report["seconds"])}
        for way, reports in found.items()
    ]


def render(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    first: dict[str, float] = {}
    for row in rows:
        seconds = row["seconds"]
        alone = first.setdefault(row["method"], seconds)
        rate = (row["read_bytes"] + row["written_bytes"]) / seconds / 1e6
        lines.append(
            (row["method"], row["way"], f"{seconds:.2f}", f"{rate:.0f}", f"{seconds / alone:.2f}")
        )
    return table(("method", "by", "s", "MB/s read and written", "times as long"), lines)


@contextmanager
def dask(folder: Path, *, hides: bool) -> Iterator[str]:
    """Start a scheduler and two workers; give its address, or nothing where no mount can hide a folder."""
    if hides and not can_mount():
        print("  without the right to mount, sending back is not measured", file=sys.stderr)
        yield ""
        return
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    dask_scheduler = (sys.executable, "-m", "distributed.cli.dask_scheduler")
    scheduler = [*dask_scheduler, "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"]
    worker = [*EDGEMERGE, "worker", address, "--host", "127.0.0.1", "--threads", "1", "--nice", "0"]
    if hides:
        worker = ["unshare", "-m", "sh", "-c", HIDDEN, str(folder), *worker]
    children = [
        subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        for command in (scheduler, worker, worker)
    ]
    try:
        time.sleep(START_SECONDS / 4)
        yield address
    finally:
        for child in children:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    return (
        subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0
    )


if __name__ == "__main__":
    main()
