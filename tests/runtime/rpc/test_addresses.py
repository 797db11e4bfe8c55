"""Addresses of rpc workers: what is read, and what is refused."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from edgemerge.errors import RecipeError
from edgemerge.runtime.rpc.addresses import MAX_WORKERS, check_trust, read_address, read_addresses


def test_names_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def look_up(host: str, port: int, *kind: Any) -> Any:
        asked.append(host)
        return [(*kind, 0, "", ("127.0.0.2", port))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert read_addresses("board-a:50052", is_trusted=False) == ("127.0.0.2:50052",)
    assert asked == ["board-a"]


def test_several_addresses_keep_their_order() -> None:
    text = "localhost:50053, 127.0.0.1:50052"
    assert read_addresses(text, is_trusted=False) == ("127.0.0.1:50053", "127.0.0.1:50052")


@pytest.mark.parametrize(
    "text", ["", "50052", ":50052", "127.0.0.1:", "::1:50052", "a:0", "a:65536"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="is no HOST:PORT of a worker"):
        read_address(text)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"no-such-board.invalid: there is no IPv4 address"):
        read_address("no-such-board.invalid:50052")


@pytest.mark.parametrize("address", ["10.0.0.7:50052", "0.0.0.0:50052", "192.168.1.2:1"])
def test_other_machines_need_trust(address: str) -> None:
    with pytest.raises(RecipeError, match=r"no password and no encryption.*--i-trust-this-network"):
        read_addresses(address, is_trusted=False)
    assert read_addresses(address, is_trusted=True) == (address,)


def test_this_machine_needs_none() -> None:
    check_trust("127.0.0.5:50052", is_trusted=False)


def test_a_worker_given_twice_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"127.0.0.1:50052 is given twice"):
        read_addresses("127.0.0.1:50052,localhost:50052", is_trusted=False)


def test_more_workers_than_ggml_takes_are_refused() -> None:
    text = ",".join(f"127.0.0.1:{50000 + i}" for i in range(MAX_WORKERS + 1))
    with pytest.raises(RecipeError, match="17 workers: ggml takes at most 16"):
        read_addresses(text, is_trusted=False)
