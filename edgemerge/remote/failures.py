"""What goes wrong on the way to a server: what passes by itself, and what does not, with its remedy."""

from __future__ import annotations

import http.client
import socket
import ssl
from pathlib import Path

from edgemerge.errors import FormatError, OutputError

__all__ = [
    "PASSING",
    "Fault",
    "Refusal",
    "describe",
    "next_delay",
    "refuse_disk",
    "refuse_status",
]

# Seconds before each further try; what comes in between begins the list anew. The first is none, as a
# server closes a connection that was idle for long.
DELAYS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0)
FIRST_DELAYS = (0.0, 0.5, 1.0)  # of a server that was never reached

# What may pass: a lost connection, a restart, a busy server. SSLError and `Fault` are OSErrors.
PASSING = (OSError, http.client.HTTPException)
BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
MAX_WAIT = 60.0  # seconds that a server may ask for


class Fault(OSError):
    """Something that may pass; `wait`: seconds that the server asks for."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        self.wait = wait
        super().__init__(reason)


class Refusal(Exception):
    """Something that does not pass: what is wrong, and the remedy."""


def describe(error: BaseException) -> str:
    """Say in a few words what broke a connection."""
    match error:
        case TimeoutError():
            return "no answer in time"
        case socket.gaierror():
            return f"its name cannot be resolved: {error.strerror}"
        case ssl.SSLError():
            return f"TLS: {error.reason or error}"
        case http.client.RemoteDisconnected():
            return "the server closed the connection"
        case OSError() if error.strerror:
            return error.strerror
    return str(error) or type(error).__name__


def _final(error: BaseException) -> str | None:
    """Return what is wrong and the remedy where an error does not pass by itself; else None."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"has a certificate that is not trusted ({error.verify_message}); check the address, or name "
            "the file of its authority in SSL_CERT_FILE"
        )
    return None


def refuse_status(status: int, retry_after: str | None) -> Exception:
    """Make the error of an answer that has no bytes of the file."""
    if status in BUSY:
        wait = float(retry_after) if retry_after and retry_after.isdecimal() else 0.0
        return Fault(f"the server answers {status}", min(wait, MAX_WAIT))
    match status:
        case 401:
            what = "wants a login (401); give it as https://USER:PASSWORD@HOST/, for the hub in HF_TOKEN"
        case 403:
            what = "may not be read (403); check your access, or get a new link if this one ran out"
        case 404 | 410:
            what = f"is not there ({status}); check the address"
        case 407:
            what = "is behind a proxy that wants a login (407); give it in HTTPS_PROXY"
        case _:
            what = f"cannot be read, as the server answers {status}; check the address"
    return Refusal(what)


def refuse_disk(error: OSError, folder: Path) -> OutputError:
    """Make the error of a folder of this machine that cannot hold a fetched file."""
    return OutputError(
        f"cannot hold what is fetched ({error.strerror}); free some of this disk, or set TMPDIR",
        path=folder,
    )


def next_delay(error: Exception, tries: int, address: object, *, is_first: bool = False) -> float:
    """Return how many seconds to wait before another try; `is_first`: no server was reached yet.

    Raises
    ------
    FormatError
        There is none; `path` is the address.
    """
    if (final := _final(error)) is not None:
        raise FormatError(final, path=str(address)) from None
    delays = FIRST_DELAYS if is_first else DELAYS
    if tries == len(delays):
        raise FormatError(
            f"could not be read in {tries + 1} tries ({describe(error)}); see to the network and give "
            "the same command again",
            path=str(address),
        ) from (
            error if isinstance(error, OSError) else OSError(str(error))
        )  # so a merge can go on
    return max(delays[tries], error.wait if isinstance(error, Fault) else 0.0)
