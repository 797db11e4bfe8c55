"""Addresses of all kinds: of servers, and in stores; nothing here talks to one."""

from __future__ import annotations

from contextlib import suppress

from edgemerge.errors import RecipeError
from edgemerge.remote.address import SCHEMES, Address, read_address
from edgemerge.remote.stores.address import StoreAddress, read_store_address

__all__ = ["AnyAddress", "read_any_address", "refuse_address", "refuse_recipe"]

AnyAddress = Address | StoreAddress


def read_any_address(text: str) -> AnyAddress:
    """Read an address of a server or a store.

    Raises
    ------
    RecipeError
        It is none. The sentence does not repeat it, as it may hold a password.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RecipeError(
            "an address has a byte that is not UTF-8; write it as %XX after https://, or rename the file"
        ) from None
    scheme = text.partition(":")[0].lower()
    return read_address(text) if scheme in SCHEMES else read_store_address(text)


def refuse_address(text: str) -> str:
    """Say that a command reads no addresses; `text`: also a path that was made of one."""
    return (
        f"{_where(text)}an address is read by merge, plan, convert, inspect and verify alone; download the "
        "model, and give its path"
    )


def refuse_recipe(text: str) -> str:
    """Say that no recipe is read from an address; `text`: also a path that was made of one."""
    return (
        f"{_where(text)}a recipe is read from a file of this machine, and only its models from addresses; "
        "download it first, as with curl -O, and give its path"
    )


def _where(text: str) -> str:
    if "://" not in text:
        text = text.replace(":/", "://", 1)
    with suppress(RecipeError):  # which shows no login
        return f"{read_any_address(text)}: "
    return f"{text}: " if text.startswith("hf:") else ""
