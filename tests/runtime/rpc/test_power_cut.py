"""A board that loses its power: two network namespaces are two boards, and the cable between them is cut."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.rpc_workers import RpcWorker, why_not
from tests.support.serving import make_served_gguf
from tests.support.talking import SLOWLY

pytestmark = [pytest.mark.llama, pytest.mark.slow]

HERE, THERE = "edgemerge-a", "edgemerge-b"
ADDRESS = "10.99.0.2:50052"
NOTICED = 60.0  # seconds; the kernel gives up after half of them


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@pytest.fixture
def cable() -> Iterator[None]:
    pytest.importorskip("llama_cpp")
    if reason := why_not():
        pytest.skip(reason)
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and ip (Debian: apt install iproute2)")
    with ExitStack() as stack:
        for name in (HERE, THERE):
            try:
                _ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(
                    f"no network namespace can be made here: {error.stderr.decode().strip()}"
                )
            stack.callback(_ip, "netns", "del", name)
        _ip("link", "add", "board", "netns", HERE, "type", "veth", "peer", "board", "netns", THERE)
        for name, address in ((HERE, "10.99.0.1/24"), (THERE, "10.99.0.2/24")):
            _ip("-n", name, "addr", "add", address, "dev", "board")
            _ip("-n", name, "link", "set", "board", "up")
        yield


def test_a_board_without_power_is_noticed(cable: None, models_dir: Path, tmp_path: Path) -> None:
    model = make_served_gguf(models_dir, tmp_path / "base.gguf")
    arguments = ["run", str(model), "-p", "the", "--raw", "-n", "0"]
    arguments += ["--rpc", ADDRESS, "--i-trust-this-network"]
    there, here = (["ip", "netns", "exec", name] for name in (THERE, HERE))
    with RpcWorker(ADDRESS, before=there):
        running = subprocess.Popen(
            [*here, *SLOWLY, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert running.stdout is not None
        assert running.stdout.read(4)
        _ip("-n", THERE, "link", "set", "board", "down")
        _, written = running.communicate(timeout=NOTICED)
    assert running.returncode == 1
    assert written == (
        f"edgemerge: the rpc worker at {ADDRESS} is gone: start it again with edgemerge rpc-worker\n"
    )
