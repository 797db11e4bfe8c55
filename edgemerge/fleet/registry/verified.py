"""The index of a registry, verified as TUF's client workflow has it, by python-tuf.

What was verified is kept in a folder of this machine. With it, older files are refused from then on.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tuf.api import exceptions
from tuf.api.metadata import Metadata, Root, Signed, Snapshot, Targets, Timestamp
from tuf.api.serialization import DeserializationError
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

from edgemerge.errors import FormatError, OutputError, VerificationError
from edgemerge.fleet.registry.carrier import Carrier
from edgemerge.formats.files import read_bounded
from edgemerge.suggestions import suggest_path

__all__ = ["MAX_INDEX", "METADATA", "TARGETS", "Index", "load_root", "read_trust", "update_index"]

METADATA, TARGETS = "metadata", "targets"  # folders of a registry
MAX_INDEX = 5_000_000  # bytes of its largest file of metadata
MAX_ROOT = 512_000
T = TypeVar("T", bound=Signed)


@dataclass(frozen=True, slots=True)
class Index:
    """Metadata that were verified, all of one moment."""

    root: Root
    timestamp: Timestamp
    snapshot: Snapshot
    targets: Targets


def update_index(
    carrier: Carrier,
    trust: bytes,
    state: Path,
    now: dt.datetime | None = None,
    *,
    newest_root: int | None = None,
) -> Index:
    """Bring the verified index of a folder up to date.

    Parameters
    ----------
    carrier : Carrier
        Of the registry.
    trust : bytes
        Root metadata that is trusted; later ones follow from it.
    state : Path
        Folder of what was verified; nobody else may use it meanwhile.
    now : datetime, optional
        With a zone, in place of the clock.
    newest_root : int, optional
        Later roots are taken for missing.

    Raises
    ------
    VerificationError
        The files are forged, old, past their date or mixed.
    FormatError
        The carrier does not give them.
    OutputError
        `state` cannot be written.
    """
    fetcher = _Fetcher(carrier, newest_root)
    with _plainly(fetcher, state):
        updater = Updater(
            str(state),
            METADATA,
            fetcher=fetcher,
            config=UpdaterConfig(root_max_length=MAX_ROOT, targets_max_length=MAX_INDEX),
            bootstrap=trust,
        )
        if now is not None:  # python-tuf has no public name for it
            updater._trusted_set.reference_time = now
        updater.refresh()
        return Index(
            _load(state, Root),
            _load(state, Timestamp),
            _load(state, Snapshot),
            _load(state, Targets),
        )


def read_trust(path: Path) -> bytes:
    """Read the root that a user names, and check that it is one.

    Raises
    ------
    FormatError
        It cannot be read.
    VerificationError
        As of `load_root`.
    """
    if not path.is_file():  # a named pipe must not hang us
        hint = suggest_path(path) or "; give the registry's 1.root.json"
        raise FormatError(f"there is no such file{hint}", path=path)
    raw = read_bounded(path, MAX_ROOT)
    load_root(raw, str(path))
    return raw


def load_root(raw: bytes, path: str, before: Root | None = None) -> Root:
    """Read root metadata; check that it is signed by the keys that it names, and by those of the one before.

    Raises
    ------
    VerificationError
        It is no root, or not so signed.
    """
    try:
        found: Metadata[Any] = Metadata.from_bytes(raw)
        if not isinstance(found.signed, Root):
            raise VerificationError(
                f"is {found.signed.type} metadata; give the registry's root, such as 1.root.json",
                path=path,
            )
        for root in (found.signed, before or found.signed):
            root.verify_delegate(Root.type, found.signed_bytes, found.signatures)
    except DeserializationError:
        raise VerificationError(
            "is no root of a registry; give its 1.root.json, from somebody you trust", path=path
        ) from None
    except (exceptions.RepositoryError, ValueError):
        raise VerificationError(
            "is not signed by the keys that it needs; get the root again, from somebody you trust",
            path=path,
        ) from None
    return found.signed


def _load(state: Path, role: type[T]) -> T:
    """Read what the updater has just verified and kept."""
    found: Metadata[Any] = Metadata.from_bytes((state / f"{role.type}.json").read_bytes())
    assert isinstance(found.signed, role)
    return found.signed


class _Fetcher(FetcherInterface):
    """Reads metadata from a carrier, and remembers what was asked for last."""

    def __init__(self, carrier: Carrier, newest_root: int | None) -> None:
        self._carrier, self._newest_root = carrier, newest_root
        self.asked = f"{METADATA}/timestamp.json"

    def _fetch(self, url: str) -> Iterator[bytes]:
        self.asked = url
        number, _, role = url.removeprefix(f"{METADATA}/").partition(".")
        is_hidden = role == "root.json" and int(number) > (self._newest_root or int(number))
        raw = None if is_hidden else self._carrier.read_small(url, MAX_INDEX)
        if raw is None:
            raise exceptions.DownloadHTTPError("is not there", 404)
        yield raw

    def where(self, role: str | None) -> str:
        """Say where the file is that an error is about: a role's, or the last."""
        same = role is None or role in self.asked
        return self._carrier.where(self.asked if same else f"{METADATA}/{role}.json")


@contextmanager
def _plainly(fetcher: _Fetcher, state: Path) -> Iterator[None]:
    """Say what python-tuf refuses in one sentence."""
    try:
        yield
    except (exceptions.RepositoryError, exceptions.DownloadError) as error:
        said = str(error)
        role = next((r for r in ("root", "timestamp", "snapshot", "targets") if r in said), None)
        where = fetcher.where(role if isinstance(error, exceptions.ExpiredMetadataError) else None)
        raise VerificationError(_describe(error, said), path=where) from None
    except OSError as error:
        raise OutputError(
            f"what is known of the registry cannot be kept ({error.strerror}); free some of its disk, or "
            "choose another folder",
            path=state,
        ) from error


def _describe(error: Exception, said: str) -> str:
    match error:
        case exceptions.ExpiredMetadataError():
            return (
                "is past its date: its publisher has not refreshed it, or somebody holds newer files back; "
                "ask the publisher, and check this machine's clock"
            )
        case exceptions.BadVersionNumberError() if "must be >=" in said or ".json version" in said:
            return (
                "is older than what this machine has seen of the registry; somebody replays old files, so "
                "get the registry from elsewhere"
            )
        case exceptions.BadVersionNumberError():
            return (
                "is of another version than the rest of the index; it was mixed or copied in part, get the "
                "registry again"
            )
        case exceptions.UnsignedMetadataError():
            return (
                "is not signed by enough of the keys that the trusted root names; get the registry from its "
                "publisher"
            )
        case exceptions.LengthOrHashMismatchError():
            return "is not the file that the index names: damaged or forged; get the registry again"
        case exceptions.DownloadLengthMismatchError():
            return "is larger than it may be: damaged, forged or hostile; get the registry again"
        case exceptions.DownloadHTTPError():
            return "is not there; check the registry's address, and that it was copied whole"
        case DeserializationError():
            return "is no metadata that can be read; damaged or hostile, get the registry again"
    return f"is refused ({said}); get the registry again"
