"""Devices on one machine: network namespaces, each behind a link of its own (iproute2; root)."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["NETWORK", "Host", "can_make_hosts", "hosts"]

NETWORK = "10.77.0"
BRIDGE = "emfleet"


@dataclass(frozen=True)
class Host:
    """A namespace with one interface."""

    name: str
    address: str
    interface: str

    def command(self, words: Sequence[str | Path]) -> list[str]:
        """Return a command as it runs on this host."""
        return ["ip", "netns", "exec", self.name, *map(str, words)]

    def received(self) -> int:
        """How many bytes came over the link so far."""
        counter = f"/sys/class/net/{self.interface}/statistics/rx_bytes"
        found = subprocess.run(
            self.command(["cat", counter]), check=True, capture_output=True, text=True
        )
        return int(found.stdout)


def can_make_hosts() -> bool:
    """Whether this user may make namespaces and shape links here."""
    return os.geteuid() == 0 and all(map(shutil.which, ("ip", "tc")))


@contextlib.contextmanager
def hosts(links: Mapping[str, int | None]) -> Iterator[dict[str, Host]]:
    """Make a host for each name, on one bridge, with a link of so many kbit/s; None is without bounds.

    They are gone at the end.
    """
    prefix = f"em{os.getpid()}"
    made = {
        name: Host(f"{prefix}-{name}", f"{NETWORK}.{i + 1}", f"em{i}h")
        for i, name in enumerate(links)
    }
    with contextlib.ExitStack() as stack:
        _ip("link", "add", BRIDGE, "type", "bridge")
        stack.callback(_ip, "link", "del", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        for i, (name, kbit) in enumerate(links.items()):
            host, outside = made[name], f"em{i}b"
            _ip("netns", "add", host.name)
            stack.callback(_ip, "netns", "del", host.name)
            _ip("link", "add", outside, "type", "veth", "peer", "name", host.interface)
            stack.callback(_ip, "link", "del", outside)
            _ip("link", "set", host.interface, "netns", host.name)
            _ip("link", "set", outside, "master", BRIDGE, "up")
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.interface)
            _ip("-n", host.name, "link", "set", host.interface, "up")
            _ip("-n", host.name, "link", "set", "lo", "up")
            if kbit is not None:
                _shape(["tc"], outside, kbit)
                _shape(["tc", "-n", host.name], host.interface, kbit)
        yield made


def _shape(tc: list[str], interface: str, kbit: int) -> None:
    shape = ["tbf", "rate", f"{kbit}kbit", "burst", "16kb", "latency", "400ms"]
    _run([*tc, "qdisc", "add", "dev", interface, "root", *shape])


def _ip(*words: str) -> None:
    _run(["ip", *words])


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")
