"""Addresses of rpc workers: read, and refused where strangers could reach them."""

from __future__ import annotations

import ipaddress
import socket

from edgemerge.errors import RecipeError

__all__ = ["MAX_WORKERS", "check_trust", "read_address", "read_addresses", "split"]

MAX_WORKERS = 16  # GGML_RPC_MAX_SERVERS of ggml-rpc.h


def read_addresses(text: str, *, is_trusted: bool) -> tuple[str, ...]:
    """Read `HOST:PORT,HOST:PORT,...` and look their names up.

    ggml's RPC sends everything in the clear and asks nobody who they are.

    Parameters
    ----------
    text : str
        Where workers listen.
    is_trusted : bool
        Whether addresses may be taken that other machines reach.

    Returns
    -------
    tuple of str
        `ADDRESS:PORT` of each, with an IPv4 address: ggml takes what was checked here, whatever the name
        means a moment later.

    Raises
    ------
    RecipeError
        An address is none, is not found, is given twice or may not be used.
    """
    found = tuple(read_address(one) for one in text.split(","))
    for address in found:
        if found.count(address) > 1:
            raise RecipeError(f"--rpc: the worker {address} is given twice: give each one once")
        check_trust(address, is_trusted=is_trusted)
    if len(found) > MAX_WORKERS:
        raise RecipeError(f"--rpc: {len(found)} workers: ggml takes at most {MAX_WORKERS}")
    return found


def read_address(text: str) -> str:
    """Read one `HOST:PORT`, and look the name up.

    Raises
    ------
    RecipeError
        It is no address, or is not found.
    """
    host, _, port = text.strip().rpartition(":")
    is_port = port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16
    if not host or not is_port or ":" in host:
        raise RecipeError(f"{text!r} is no HOST:PORT of a worker, as 127.0.0.1:50052 is")
    try:
        found = socket.getaddrinfo(host, int(port), socket.AF_INET, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise RecipeError(
            f"{host}: there is no IPv4 address of that name: check it, or give the address itself"
        ) from error
    return f"{found[0][4][0]}:{int(port)}"


def check_trust(address: str, *, is_trusted: bool) -> None:
    """Refuse an address that other machines reach, unless its network is trusted.

    Raises
    ------
    RecipeError
        It is so.
    """
    host, _ = split(address)
    if not is_trusted and not ipaddress.ip_address(host).is_loopback:
        raise RecipeError(
            f"{address} is reached over a network, and ggml's RPC has no password and no encryption: "
            "go through ssh -L, or give --i-trust-this-network for a WireGuard tunnel or a cable of yours"
        )


def split(address: str) -> tuple[str, int]:
    """Host and port of `ADDRESS:PORT`."""
    host, _, port = address.rpartition(":")
    return host, int(port)
