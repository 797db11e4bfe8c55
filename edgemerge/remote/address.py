"""Addresses of files: what is asked for, as whom, and what of it may be shown."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from urllib.parse import quote, unquote, urljoin, urlsplit

from edgemerge.errors import RecipeError

__all__ = ["SCHEMES", "Address", "read_address"]

SCHEMES = ("http", "https")
PORTS = {"http": 80, "https": 443}
_SAFE = "/%:@!$&'()*+,;=~-._"


@dataclass(frozen=True, slots=True)
class Address:
    """A file at http:// or https://. Its text has neither login nor query, which may be secret."""

    scheme: str
    host: str
    port: int
    path: str  # quoted, begins with a slash
    query: str = ""
    authorization: str | None = None  # the header's value
    shown: str | None = None  # in its place, where it is another's address with a signature
    renew: Callable[[], Address] | None = field(default=None, compare=False)  # when that ran out

    def __str__(self) -> str:
        return self.shown or f"{self.origin}{self.path}"

    def __repr__(self) -> str:
        return f"Address({self})"

    @property
    def origin(self) -> str:
        """Scheme, host and port: who may know the login."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}"

    @property
    def target(self) -> str:
        """What the request asks the server for."""
        return self.path + (f"?{self.query}" if self.query else "")

    @property
    def name(self) -> str:
        """The last part of the path, as a file would be called; empty where there is none."""
        return unquote(self.path.rstrip("/").rpartition("/")[2])

    def beside(self, name: str) -> Address:
        """Return the address of a file in the same folder; the query goes along, as a token may be in it."""
        return replace(self, path=f"{self.path.rpartition('/')[0]}/{quote(name)}")

    def inside(self, name: str) -> Address:
        """Return the address of a file in this folder."""
        return replace(self, path=f"{self.path.rstrip('/')}/{quote(name)}")

    def follow(self, location: str) -> Address:
        """Return where a redirect leads; another server is not told the login.

        Raises
        ------
        RecipeError
            It leads from https to http, or to something else.
        """
        try:
            there = _read(urljoin(f"{self.origin}{self.target}", location))
        except ValueError:
            raise RecipeError(f"{self}: the server leads on to what is no address") from None
        if self.scheme == "https" and there.scheme != "https":
            raise RecipeError(f"{self}: the server leads on to {there}, which is not encrypted")
        if there.authorization is None and there.origin == self.origin:
            there = replace(there, authorization=self.authorization)
        return there


def read_address(text: str) -> Address:
    """Read an address, with a login where it has one: https://USER:PASSWORD@HOST/PATH.

    Raises
    ------
    RecipeError
        It is none, or has another scheme. The sentence does not repeat it, as it may hold a password.
    """
    address, parts = _read(text), urlsplit(text)
    # A slash in a password ends what is taken for the server, and the rest would be shown. A server that
    # leads on may well have @ in a path.
    after = parts.path or f"{parts.query}{parts.fragment}"
    if "@" in after and ":" in parts.netloc.rpartition("@")[2].rpartition("]")[2]:
        raise RecipeError(
            "an address cannot be read; write / and @ of a login as %2F and %40, and @ of a path, too"
        )
    return address


def _read(text: str) -> Address:
    try:
        parts = urlsplit(text)
        scheme, host, port = parts.scheme.lower(), parts.hostname, parts.port
        (host or "").encode("idna")  # what a connection does: of a name that is none it raises
    except ValueError:
        scheme, host, port = "", None, None
    if scheme not in SCHEMES or not host:
        what = f"begins with {scheme}://" if scheme else "cannot be read"
        raise RecipeError(f"an address {what}; give one that begins with https://HOST/")
    authorization = None
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        authorization = f"Basic {b64encode(login.encode()).decode()}"
    return Address(
        scheme,
        host,
        port or PORTS[scheme],
        quote(parts.path or "/", safe=_SAFE),
        quote(parts.query, safe=_SAFE + "?"),
        authorization,
    )
