"""Three network namespaces as three machines: nothing is shared but a network, which may be cut."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.dask_cluster import environment, merge_by_client
from tests.support.places import ROOT
from tests.support.tiny_gguf import write_tiny_gguf

ADDRESS = "tcp://10.77.0.1:8786"
# The worker's models are copies, and it sees another folder in the place of the output's.
ELSEWHERE = 'mount --bind "$0" "$1" && mount -t tmpfs none "$2" && shift 2 && exec "$@"'


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Machines:
    """A machine `a` with a bridge, and `b` and `c`, which reach it."""

    def __init__(self) -> None:
        self.names = [f"em{os.getpid()}{letter}" for letter in "abc"]
        for name in self.names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        first, *others = self.names
        ip("-n", first, "link", "add", "bridge", "type", "bridge")
        ip("-n", first, "addr", "add", "10.77.0.1/24", "dev", "bridge")
        ip("-n", first, "link", "set", "bridge", "up")
        for i, name in enumerate(others, 2):
            pair = ["type", "veth", "peer", "name", "eth0", "netns", name]
            ip("link", "add", f"v{i}", "netns", first, *pair)
            ip("-n", first, "link", "set", f"v{i}", "master", "bridge", "up")
            ip("-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")

    def start(self, number: int, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[number], *words],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )

    def cut(self, number: int) -> None:
        ip("-n", self.names[number], "link", "set", "eth0", "down")

    def close(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@contextmanager
def three_machines(models: Path, out: Path, folder: Path) -> Iterator[Machines]:
    """Start a scheduler on the first, and on each other a worker with copies of the models."""
    machines = Machines()
    dask = (sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "10.77.0.1")
    children = [machines.start(0, *dask, "--port", "8786", "--no-dashboard")]
    for number in (1, 2):
        copies = folder / f"copies{number}"
        shutil.copytree(models, copies)
        worker = [sys.executable, "-m", "edgemerge", "worker", ADDRESS, "--threads", "1"]
        elsewhere = [str(copies), str(models), str(out), *worker, "--nice", "0"]
        children.append(machines.start(number, "unshare", "-m", "sh", "-c", ELSEWHERE, *elsewhere))
    try:
        yield machines
    finally:
        for child in children:
            child.kill()
            child.communicate()
        machines.close()


@pytest.mark.slow
@pytest.mark.parametrize("is_cut", [False, True], ids=["sound", "cut"])
def test_machines_that_share_nothing_make_the_same_bytes(tmp_path: Path, is_cut: bool) -> None:
    """The network of one worker is cut while it works: the other one makes its tensors."""
    if not may_make_machines():
        pytest.skip("no network or mount namespace can be made here")
    models, out = tmp_path / "models", tmp_path / "out"
    models.mkdir()
    out.mkdir()
    paths = [str(write_tiny_gguf(models / f"{seed}.gguf", seed=seed)) for seed in range(3)]
    orders = [
        {"method": method, "models": paths[1:], "recipe": {"base": paths[0], **recipe}}
        for method, recipe in RECIPES.items()
    ]
    alone = merge_by_client([one | {"output": f"{tmp_path}/alone.gguf"} for one in orders])
    with three_machines(models, out, tmp_path) as machines:
        todo = [one | {"output": f"{out}/made.gguf", "cluster": ADDRESS} for one in orders]
        patches: dict[str, Any] = {"piece_elements": 4096, "piece_bytes": 16384}
        if is_cut:
            patches |= {"pause": 0.1, "log": str(tmp_path / "log")}
        text = json.dumps([todo, patches])
        client = machines.start(0, sys.executable, "-m", "tests.support.cluster_client", text)
        if is_cut:
            while not (tmp_path / "log").exists():
                assert client.poll() is None, client.communicate()
                time.sleep(0.05)
            time.sleep(1.0)
            machines.cut(1)
        found, errors = client.communicate(timeout=400)
    answers = [json.loads(line) for line in found.splitlines()]
    assert [one.get("sha256") for one in answers] == [one["sha256"] for one in alone], errors


RECIPES: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"out_type": "Q8_0"},
    "ties": {"parameters": {"weight": 0.5, "density": 0.4}},
    "hierarchical": {},
}


def may_make_machines() -> bool:
    name = f"em{os.getpid()}x"
    try:
        ip("netns", "add", name)
        subprocess.run(["unshare", "-m", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
    return True
