"""Addresses in stores: s3://BUCKET/KEY, sftp://HOST/PATH and others; what of them may be shown."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from urllib.parse import unquote

from edgemerge.errors import RecipeError

__all__ = ["EXTRA", "KNOWN", "S3", "SFTP", "StoreAddress", "read_store_address"]

EXTRA = "pip install 'edgemerge[remote]'"
KNOWN = "give one that begins with https://HOST/, hf://, s3://BUCKET/ or sftp://HOST/"
S3 = ("s3", "s3a")
SFTP = ("sftp", "ssh")
# What fsspec knows beside them reads files of this machine, or wraps another address.
NO_STORES = frozenset({"async_wrapper", "asynclocal", "asyncwrapper", "blockcache", "cached"})
NO_STORES |= {"data", "dir", "file", "filecache", "generic", "git", "hf", "jlab", "jupyter"}
NO_STORES |= {"libarchive", "local", "memory", "pyscript", "reference", "simplecache", "tar", "zip"}
_ADDRESS = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?:(?P<login>[^/@]*)@)?(?P<host>\[[0-9a-f:.]+\]|[^/:@\[\]]+)"
    r"(?::(?P<port>\d{1,5}))?(?P<path>/[^?]*)(?:\?(?P<query>.*))?",
    re.ASCII | re.IGNORECASE | re.DOTALL,
)
# A user's ~/.ssh/config may give a host to a shell, or to a program that would take -x for an option.
_SSH_HOST = re.compile(r"\[[0-9a-f:.]+\]|\w[\w.-]*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """A file or folder in a store. Its text has neither login nor query, which may be secret."""

    scheme: str
    host: str  # or bucket
    path: str  # as the store has it; begins with a slash
    port: int | None = None
    query: str = ""
    login: tuple[str, str | None] | None = None  # user and password

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port is None else f":{self.port}"
        return f"{self.scheme}://{host}{port}{self.path}"

    def __repr__(self) -> str:
        return f"StoreAddress({self})"

    @property
    def name(self) -> str:
        """The last part of the path; empty where there is none."""
        return self.path.rstrip("/").rpartition("/")[2]

    def beside(self, name: str) -> StoreAddress:
        """Return the address of a file in the same folder."""
        return replace(self, path=f"{self.path.rpartition('/')[0]}/{name}", query="")

    def inside(self, name: str) -> StoreAddress:
        """Return the address of a file in this folder."""
        return replace(self, path=f"{self.path.rstrip('/')}/{name}", query="")


def read_store_address(text: str) -> StoreAddress:
    """Read an address, with a login where it has one: sftp://USER:PASSWORD@HOST/PATH.

    Raises
    ------
    RecipeError
        It is none. The sentence does not repeat it, as it may hold a password.
    """
    match = _ADDRESS.fullmatch(text)
    scheme = match["scheme"].lower() if match else ""
    # A slash in a password ends what is taken for the host, and the rest would be shown.
    is_broken = match is None or (match["port"] and (scheme in S3 or "@" in match["path"]))
    if match is None or is_broken:
        raise RecipeError(
            "an address cannot be read; give one such as s3://BUCKET/KEY or sftp://USER@HOST/PATH, and "
            "write / and @ of a login as %2F and %40"
        )
    if scheme in SFTP and not _SSH_HOST.fullmatch(match["host"]):
        raise RecipeError(
            "an address of sftp:// has a host that is no plain name; give it an alias of letters, digits, "
            "'.', '-' and '_' in ~/.ssh/config"
        )
    if scheme in NO_STORES:
        raise RecipeError(
            f"an address begins with {scheme}://, which names no other machine; {KNOWN}"
        )
    login = None
    if match["login"]:
        user, colon, password = match["login"].partition(":")
        login = unquote(user), unquote(password) if colon else None
    return StoreAddress(
        scheme,
        match["host"].strip("[]"),
        match["path"],
        int(match["port"]) if match["port"] else None,
        match["query"] or "",
        login,
    )
