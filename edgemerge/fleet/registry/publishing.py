"""Publishing in a registry: a file, the removal of one, and signing anew."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuf.api.metadata import TargetFile, Targets, Timestamp

from edgemerge.errors import FormatError, RecipeError
from edgemerge.fleet.registry.entries import (
    MAX_LICENCE,
    MAX_SCORES,
    NAME,
    VERSION,
    Entry,
    custom_of,
    file_name,
    is_licence,
    scores_text,
    target_path,
    version_key,
)
from edgemerge.fleet.registry.folder import RegistryFolder
from edgemerge.fleet.registry.keys import check_signers
from edgemerge.fleet.registry.offers import Offer, read_offer
from edgemerge.output.file import finishing, sync_folder
from edgemerge.types import Progress

__all__ = ["Asked", "publish", "refresh", "remove"]

OWN = "edgemerge"  # what the index states beside TUF's own: the highest version that each name ever had
CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be published of a file, beside what its header says."""

    name: str
    version: str
    licence: str | None = None  # None: what the file states
    base: str | None = None  # checksum of the base
    scores: Mapping[str, Any] = field(default_factory=dict)


def publish(folder: RegistryFolder, file: Path, asked: Asked, progress: Progress) -> Entry:
    """Add a file to a registry.

    Parameters
    ----------
    folder : RegistryFolder
        Of the registry.
    file : Path
        Delta, LoRA adapter or model, in one GGUF.
    asked : Asked
        What it is called.
    progress : callable
        Called with bytes copied and bytes in all.

    Raises
    ------
    RecipeError
        Name, version, licence or scores cannot be taken, or the keys may not sign.
    FormatError, MismatchError
        The file is none of these, or of another base.
    VerificationError
        The registry is not what this machine knows.
    OutputError
        The registry cannot be written, or another process writes it.
    """
    _check_names(asked)
    _check_stated(asked)
    offer = read_offer(file, asked.base)
    with folder.locked():
        draft = folder.read()
        check_signers(draft.root, Targets.type, folder.signers, "--key")
        highest = _highest(draft.targets)
        _check_newer(asked, highest)
        entry = _copy(folder, file, asked, offer, progress)
        path = target_path(entry)
        custom = {"custom": custom_of(entry)}
        hashes = {"sha256": entry.sha256}
        draft.targets.targets[path] = TargetFile(entry.n_bytes, hashes, path, custom)
        versions = {**highest, asked.name: asked.version}
        draft.targets.unrecognized_fields[OWN] = {"versions": versions}
        folder.write(draft)
    return entry


def remove(folder: RegistryFolder, name: str, version: str) -> None:
    """Take a version out of the index; the file itself goes when the next index is written.

    Raises
    ------
    RecipeError
        There is none, or the keys may not sign.
    VerificationError, OutputError
        As of `publish`.
    """
    with folder.locked():
        draft = folder.read()
        check_signers(draft.root, Targets.type, folder.signers, "--key")
        named = [path for path in draft.targets.targets if path.startswith(f"{name}/{version}/")]
        if not named:
            raise RecipeError(f"the registry has no version {version!r} of {name!r}; see its list")
        del draft.targets.targets[named[0]]
        folder.write(draft)


def refresh(folder: RegistryFolder) -> None:
    """Sign the index anew, so that it lasts; without enough publishers' keys, the timestamp alone is signed.

    Raises
    ------
    RecipeError
        The keys may not sign, or sign the timestamp alone of an index that is past its date.
    VerificationError, OutputError
        As of `publish`.
    """
    with folder.locked():
        draft = folder.read()
        check_signers(draft.root, Timestamp.type, folder.signers, "--key")
        known = draft.root.roles[Targets.type].keyids
        publishers = [signer for signer in folder.signers if signer.public_key.keyid in known]
        n_publishers = len({signer.public_key.keyid for signer in publishers})
        is_enough = n_publishers >= draft.root.roles[Targets.type].threshold
        if is_enough or len(publishers) == len(folder.signers) or not draft.present[0]:
            check_signers(draft.root, Targets.type, publishers or folder.signers, "--key")
            folder.write(draft)
        else:
            folder.write_timestamp(draft)


def _check_names(asked: Asked) -> None:
    if NAME.fullmatch(asked.name) is None:
        raise RecipeError(
            f"the name {asked.name!r} cannot be used; give up to 64 lower-case letters, digits, dots, "
            "dashes and underscores, as in ward-notes"
        )
    if VERSION.fullmatch(asked.version) is None:
        raise RecipeError(
            f"the version {asked.version!r} cannot be used; give numbers with dots between, as in 3 or 1.2"
        )


def _check_stated(asked: Asked) -> None:
    """Refuse what readers would refuse, and the file with it."""
    if asked.licence is not None and not is_licence(asked.licence):
        raise RecipeError(
            f"--licence has several lines, or more than {MAX_LICENCE} characters; give the licence's name, "
            "as in CC BY 4.0"
        )
    if len(scores_text(asked.scores)) > MAX_SCORES:
        raise RecipeError(
            f"--scores has more figures than the {MAX_SCORES} characters that the index takes; evaluate the "
            "file on fewer tasks"
        )


def _highest(targets: Targets) -> dict[str, str]:
    """Return the highest version that each name ever had, also of what was removed."""
    stated = targets.unrecognized_fields.get(OWN)
    found = stated.get("versions") if isinstance(stated, dict) else None
    if not isinstance(found, dict):
        return {}
    return {name: text for name, text in found.items() if VERSION.fullmatch(str(text))}


def _check_newer(asked: Asked, highest: Mapping[str, str]) -> None:
    last = highest.get(asked.name)
    if last is not None and version_key(asked.version) <= version_key(last):
        raise RecipeError(
            f"{asked.name} had the version {last} already, and a version stands for one file for ever; give "
            "a higher one"
        )


def _copy(
    folder: RegistryFolder, file: Path, asked: Asked, offer: Offer, progress: Progress
) -> Entry:
    """Copy a file to its place, durably, and describe it."""
    called = file_name(asked.name, asked.version, offer.kind)
    home = folder.targets / asked.name / asked.version
    part = home / f"{called}.part"
    with finishing(part), _without_remains(part):
        home.mkdir(parents=True, exist_ok=True)
        n_bytes, sha256 = _copy_bytes(file, part, progress)
        if read_offer(part, asked.base) != offer:
            raise FormatError("changed while it was read; wait for its writer", path=file)
        os.replace(part, home / f"{sha256}.{called}")
        for one in (home, home.parent, folder.targets, folder.path):
            sync_folder(one)
    return Entry(
        asked.name,
        asked.version,
        called,
        n_bytes,
        sha256,
        offer.base,
        offer.kind,
        offer.licence if asked.licence is None else asked.licence,
        asked.scores,
        folder.signers[0].public_key.keyid,
        folder.now.isoformat(),
    )


@contextlib.contextmanager
def _without_remains(part: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # folders with other versions stay
            part.unlink(missing_ok=True)
            part.parent.rmdir()
            part.parent.parent.rmdir()
        raise


def _copy_bytes(file: Path, part: Path, progress: Progress) -> tuple[int, str]:
    digest, at = hashlib.sha256(), 0
    with file.open("rb") as source, part.open("wb") as target:
        n_bytes = os.fstat(source.fileno()).st_size
        while raw := source.read(CHUNK):
            target.write(raw)
            digest.update(raw)
            at += len(raw)
            progress(at, n_bytes)
        target.flush()
        os.fsync(target.fileno())
    return at, digest.hexdigest()
