"""A connection to a server, over which ranges of one file are asked for: proxy, TLS, redirects."""

from __future__ import annotations

import http.client
import os
import socket
import ssl
import threading
from base64 import b64encode
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from urllib.parse import unquote, urlsplit

from edgemerge.errors import RecipeError
from edgemerge.remote.address import Address
from edgemerge.remote.failures import Refusal

__all__ = ["Link", "Route"]

REDIRECTS = frozenset({301, 302, 303, 307, 308})
MAX_REDIRECTS = 8
STALE = frozenset({400, 401, 403, 404, 410})  # how a link that ran out is answered
MAX_DRAINED = 1 << 16  # bytes of an answer that are read so that the connection can go on
TIMEOUT = 30.0  # seconds without a byte
# The first that is set counts. OpenSSL itself heeds SSL_CERT_FILE, and SSL_CERT_DIR beside it.
BUNDLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "AWS_CA_BUNDLE")


class Route:
    """Where a file is asked for, and where the server leads on to; all links of a file have one.

    Parameters
    ----------
    address : Address
        Of the file.
    works : bool
        Whether the server is known to give the file; an address with a signature may then have run out.
    """

    def __init__(self, address: Address, works: bool = False) -> None:
        self.address = address
        self.current = address
        self._works = works
        self._lock = threading.Lock()

    def answered(self, address: Address) -> None:
        """Remember which address was answered with bytes."""
        self.current, self._works = address, True

    def renew(self, used: Address) -> bool:
        """Get another signature in the place of one that ran out; False where that is not the fault."""
        with self._lock:
            if self.address is not used:  # another thread was faster
                return True
            if used.renew is None or not self._works:
                return False
            self.address = self.current = used.renew()
            self._works = False
            return True


class Link:
    """One connection; not thread-safe, but for `cut`."""

    def __init__(self, route: Route) -> None:
        self._route = route
        self._connection: http.client.HTTPConnection | None = None
        # A server that closes after its answer gives the socket to that alone.
        self._response: http.client.HTTPResponse | None = None
        self._socket: socket.socket | None = None
        self._origin = ""

    def ask(self, start: int, stop: int) -> http.client.HTTPResponse:
        """Ask for bytes [start, stop), and return the answer, whatever its status.

        Raises
        ------
        OSError, HTTPException
            The server cannot be reached.
        Refusal
            Redirects lead nowhere.
        """
        route = self._route
        first, address = route.address, route.current
        is_fresh = address == first
        for _ in range(MAX_REDIRECTS):
            response = self._send(address, {"Range": f"bytes={start}-{stop - 1}"})
            location = response.headers.get("Location")
            if response.status in REDIRECTS and location:
                self._drain(response)
                try:
                    address = address.follow(location)
                except RecipeError as error:
                    raise Refusal(f"leads to another address that is not used: {error}") from None
            elif response.status in STALE and not is_fresh:
                self._drain(response)
                address, is_fresh = first, True
            elif response.status in STALE and route.renew(first):
                self._drain(response)
                first = address = route.address
            else:
                if response.status == 206:
                    route.answered(address)
                return response
        raise Refusal("is led from one address to the next without an end; check the address")

    def _send(self, address: Address, headers: dict[str, str]) -> http.client.HTTPResponse:
        if address.origin != self._origin or self._connection is None:
            self.close()
            self._connection, self._origin = _connect(address), address.origin
        proxy = _proxy(address)
        target = address.target
        if proxy is not None and address.scheme == "http":
            target = address.origin + address.target
            headers = headers | _proxy_login(proxy)
        if address.authorization is not None:
            headers = headers | {"Authorization": address.authorization}
        agent = f"edgemerge/{version('edgemerge')}"
        headers = {"Accept-Encoding": "identity", "User-Agent": agent, **headers}
        self._connection.request("GET", target, headers=headers)
        self._socket = self._connection.sock
        self._response = self._connection.getresponse()
        return self._response

    def _drain(self, response: http.client.HTTPResponse) -> None:
        """Read a short answer to its end, or give the connection up."""
        response.read(MAX_DRAINED)
        if not response.isclosed():
            self.close()

    def close(self) -> None:
        """Close the connection; the next question opens another."""
        if self._connection is not None:
            self._connection.close()
        if self._response is not None:
            self._response.close()
        self._connection = self._response = self._socket = None

    def cut(self) -> None:
        """Make a read that waits in another thread end at once."""
        connection = self._connection
        opened = self._socket or (connection.sock if connection is not None else None)
        if opened is not None:
            with suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)


def _connect(address: Address) -> http.client.HTTPConnection:
    proxy = _proxy(address)
    host, port = (address.host, address.port) if proxy is None else _proxy_place(proxy)
    if address.scheme == "http":
        return http.client.HTTPConnection(host, port, timeout=TIMEOUT)
    connection = http.client.HTTPSConnection(
        host, port, timeout=TIMEOUT, context=_tls(*map(os.environ.get, BUNDLES))
    )
    if proxy is not None:
        connection.set_tunnel(address.host, address.port, _proxy_login(proxy))
    return connection


@cache
def _tls(openssl: str | None, *others: str | None) -> ssl.SSLContext:
    bundle = openssl or next(filter(None, others), None)
    try:
        if openssl or bundle is None:
            return ssl.create_default_context()
        if os.path.isdir(bundle):
            return ssl.create_default_context(capath=bundle)
        return ssl.create_default_context(cafile=bundle)
    except OSError as error:
        raise Refusal(
            f"cannot be trusted, as {bundle} cannot be read ({error.strerror or error}); see to "
            f"{' or '.join(BUNDLES)}"
        ) from None


def _proxy(address: Address) -> str | None:
    """Return the proxy that the usual variables name for a server."""
    from urllib.request import getproxies, proxy_bypass

    found = getproxies()
    proxy = found.get(address.scheme) or found.get("all")
    if not proxy or proxy_bypass(f"{address.host}:{address.port}", found):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _proxy_place(proxy: str) -> tuple[str, int]:
    try:
        parts = urlsplit(proxy)
        host, port = parts.hostname, parts.port or 80
        (host or "").encode("idna")  # what a connection does: of a name that is none it raises
    except ValueError:
        raise Refusal(
            "is behind a proxy whose address cannot be read; give http://HOST:PORT in HTTP_PROXY or "
            "HTTPS_PROXY"
        ) from None
    if parts.scheme != "http" or not host:
        raise Refusal(
            f"is behind a proxy that begins with {parts.scheme}://; only http:// is known, give such a "
            "one in HTTPS_PROXY"
        )
    return host, port


def _proxy_login(proxy: str) -> dict[str, str]:
    parts = urlsplit(proxy)
    if parts.username is None:
        return {}
    login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Proxy-Authorization": f"Basic {b64encode(login.encode()).decode()}"}
