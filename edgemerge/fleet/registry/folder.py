"""A registry's folder as its publisher has it: files are replaced in an order in which no reader sees a mix.

New files come first, under names of their own: what is published by its hash, targets and snapshot by their
version. The timestamp comes last and names them. Each is durable before the next. A publisher that is killed
leaves the old index, and the next one takes the same numbers again.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, T, Targets, Timestamp

from edgemerge.errors import OutputError, RecipeError, VerificationError
from edgemerge.fleet.registry.carrier import open_carrier
from edgemerge.fleet.registry.client import lock_state, state_folder
from edgemerge.fleet.registry.verified import (
    MAX_INDEX,
    METADATA,
    TARGETS,
    load_root,
    read_trust,
    update_index,
)
from edgemerge.formats.files import read_bounded
from edgemerge.output.file import finishing, write_file
from edgemerge.remote.stand_ins import is_address

__all__ = ["Draft", "RegistryFolder", "sign"]

ALWAYS = datetime.min.replace(tzinfo=UTC)  # a time before which nothing is past its date
INDEX = ("timestamp.json", "snapshot.json", "targets.json")  # of what a machine knows
_STORED = re.compile(r"[0-9a-f]{64}\..+|.+\.part", re.ASCII)
_NUMBERED = re.compile(r"(\d+)\.(targets|snapshot)\.json", re.ASCII)


@dataclass(slots=True)
class Draft:
    """The next index, made of the present one."""

    root: Root
    targets: Targets  # to be changed
    before: Targets  # the present ones
    present: tuple[int, int, int]  # versions of targets, snapshot and timestamp; 0: there are none
    until: datetime | None = None  # how long readers take the present targets and snapshot


class RegistryFolder:
    """A registry's folder, and the keys that sign what is written there.

    Parameters
    ----------
    path : Path
        The folder.
    signers : sequence of CryptoSigner
        The keys that sign.
    lasts : timedelta
        How long readers take what is signed now.
    trust : Path, optional
        Root that is trusted; else the one that this machine saw first here.
    state : Path, optional
        Folder of what this machine has seen of the registry.
    now : datetime, optional
        With a zone, in place of the clock.

    Attributes
    ----------
    until : datetime
        How long readers take what is signed now.
    index_until : datetime or None
        How long they take the targets and the snapshot, which publishers alone sign, as read last.
    root_until : datetime or None
        How long readers take the root, as it was read last.

    Raises
    ------
    RecipeError
        It is an address.
    """

    def __init__(
        self,
        path: Path,
        signers: Sequence[CryptoSigner],
        lasts: timedelta,
        *,
        trust: Path | None = None,
        state: Path | None = None,
        now: datetime | None = None,
    ) -> None:
        if is_address(str(path)):
            raise RecipeError(
                "a registry is written in a folder of this machine; publish there, then copy the folder to "
                "the server"
            )
        self.path, self.signers, self._trust = path, signers, trust
        self.metadata, self.targets = path / METADATA, path / TARGETS
        self._state = state or state_folder(str(path))
        self.now = (now or datetime.now(UTC)).astimezone(UTC).replace(microsecond=0)
        self.until = self.now + lasts
        self.index_until: datetime | None = None
        self.root_until: datetime | None = None

    @property
    def is_made(self) -> bool:
        """Whether there is a registry: a full disk may leave its folders empty."""
        return any(self.metadata.glob("*.json"))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only one who writes the registry.

        Raises
        ------
        OutputError
            Another process writes it, or it is none.
        """
        if not self.is_made:
            raise OutputError("is no registry; make one with publish --init", path=self.path)
        try:
            file = (self.path / ".publishing").open("ab")
        except OSError as error:
            raise OutputError(f"cannot be written ({error.strerror})", path=self.path) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(
                    "another publish is at work there; wait for that one", path=self.path
                ) from None
            yield

    def read(self) -> Draft:
        """Read the present index, verified as a reader does, but for its dates.

        Raises
        ------
        VerificationError
            It is not what this machine knows.
        """
        trust = self._read_trust()
        if self._has_index():
            draft = self._update(trust, self._state, None)
        else:
            root = load_root(trust, str(self.metadata))
            draft = Draft(root, Targets(), Targets(), (0, 0, 0))
        self.index_until, self.root_until = draft.until, draft.root.expires
        return draft

    def read_before(self, last: int) -> Draft:
        """Read an index that is still signed under the root before the last, which that one verifies.

        Raises
        ------
        VerificationError
            It is not what this machine knows.
        """
        with tempfile.TemporaryDirectory() as folder:
            for name in INDEX:  # so that what is older is refused as ever
                with contextlib.suppress(FileNotFoundError):
                    shutil.copy(self._state / name, folder)
            draft = self._update(self._read_trust(), Path(folder), last - 1)
        path = self.metadata / f"{last}.root.json"
        draft.root = load_root(read_bounded(path, MAX_INDEX), str(path), draft.root)
        return draft

    def write(
        self, draft: Draft, root: tuple[str, bytes] | None = None, *, root_first: bool = False
    ) -> None:
        """Write the next index, the timestamp last, and a new root after it or before.

        Raises
        ------
        OutputError
            The disk refused, or the index is too large.
        """
        targets, snapshot, timestamp = (version + 1 for version in draft.present)
        draft.targets.version, draft.targets.expires = targets, self.until
        raw = sign(draft.targets, self.signers)
        if len(raw) > MAX_INDEX:
            raise OutputError(
                f"the index would have more than {MAX_INDEX / 1e6:g} MB; remove old versions first",
                path=self.path,
            )
        self._place(f"{targets}.targets.json", raw)
        meta = {"targets.json": MetaFile.from_data(targets, raw, ["sha256"])}
        raw = sign(Snapshot(snapshot, expires=self.until, meta=meta), self.signers)
        self._place(f"{snapshot}.snapshot.json", raw)
        last = [("timestamp.json", self._timestamp(timestamp, snapshot, raw))]
        if root is not None:
            last.insert(0 if root_first else 1, root)
        for name, content in last:
            self._place(name, content)
        self._tidy(draft)
        self.read()  # as readers will; what this machine knows is then up to date

    def write_timestamp(self, draft: Draft) -> None:
        """Sign the timestamp alone anew; it lasts no longer than what it names.

        Raises
        ------
        RecipeError
            What it names is past its date.
        OutputError
            The disk refused.
        """
        assert draft.until is not None
        if draft.until <= self.now:
            raise RecipeError(
                f"the index lasted until {draft.until:%Y-%m-%d}, and this key signs the timestamp alone; "
                "give publish --refresh a publisher's --key"
            )
        self.until = min(self.until, draft.until)
        _, snapshot, timestamp = draft.present
        raw = read_bounded(self.metadata / f"{snapshot}.snapshot.json", MAX_INDEX)
        self._place("timestamp.json", self._timestamp(timestamp + 1, snapshot, raw))
        self.read()

    def forget(self) -> None:
        """Forget the registry that this machine knew here before.

        Raises
        ------
        OutputError
            The disk refused.
        """
        with finishing(self._state):
            shutil.rmtree(self._state / "root_history", ignore_errors=True)
            for name in (*INDEX, "root.json", "trust.json"):
                (self._state / name).unlink(missing_ok=True)

    def _timestamp(self, version: int, snapshot: int, raw: bytes) -> bytes:
        meta = MetaFile.from_data(snapshot, raw, ["sha256"])
        signed = Timestamp(version, expires=self.until, snapshot_meta=meta)
        return sign(signed, self.signers)

    def _place(self, name: str, raw: bytes) -> None:
        write_file(self.metadata / name, raw)

    def _read_trust(self) -> bytes:
        """Return the root to begin with: what the user names, what was seen first, else what is there."""
        if self._trust is not None:
            return read_trust(self._trust)
        known = self._state / "trust.json"
        if not known.is_file():
            raw = read_trust(self.metadata / "1.root.json")
            with finishing(known):
                self._state.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_file(known, raw)
        return known.read_bytes()

    def _has_index(self) -> bool:
        if (self.metadata / "timestamp.json").exists():
            return True
        if (self._state / "timestamp.json").exists():
            raise VerificationError(
                "has lost its timestamp.json; copy the registry back from where it is whole",
                path=self.path,
            )
        return False

    def _update(self, trust: bytes, state: Path, newest_root: int | None) -> Draft:
        with contextlib.closing(open_carrier(str(self.path))) as carrier, lock_state(state):
            index = update_index(carrier, trust, state, ALWAYS, newest_root=newest_root)
        parts = (index.targets, index.snapshot, index.timestamp)
        targets, snapshot, timestamp = (part.version for part in parts)
        before = copy.deepcopy(index.targets)
        until = min(index.targets.expires, index.snapshot.expires)
        return Draft(index.root, index.targets, before, (targets, snapshot, timestamp), until)

    def _tidy(self, draft: Draft) -> None:
        """Remove what neither the new index names nor the one before, which somebody may be reading."""
        present = dict(zip(("targets", "snapshot"), draft.present, strict=False))
        for path in self.metadata.iterdir():
            match = _NUMBERED.fullmatch(path.name)
            if match and int(match[1]) < present[match[2]]:
                path.unlink()
        named = {**draft.before.targets, **draft.targets.targets}.values()
        stored = {self.targets / path for one in named for path in one.get_prefixed_paths()}
        for path in self.targets.glob("*/*/*"):
            if path not in stored and _STORED.fullmatch(path.name):
                path.unlink()
                for folder in (path.parent, path.parent.parent):
                    with contextlib.suppress(OSError):  # it has others
                        folder.rmdir()


def sign(signed: T, signers: Sequence[CryptoSigner]) -> bytes:
    """Return metadata with the signatures of all keys."""
    metadata = Metadata(signed)
    for signer in signers:
        metadata.sign(signer, append=True)
    return metadata.to_bytes()
