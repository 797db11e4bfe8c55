"""The root of a registry: which keys may sign what. It is made once, and changed by its own keys alone."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from securesystemslib.signer import CryptoSigner, Key
from tuf.api.metadata import Root, Snapshot, Targets, Timestamp

from edgemerge.errors import OutputError, VerificationError
from edgemerge.fleet.registry.folder import Draft, RegistryFolder, sign
from edgemerge.fleet.registry.keys import PUBLISHING, check_signers, set_keys
from edgemerge.output.file import write_file

__all__ = ["Keys", "create", "rotate"]

_ROOT = re.compile(r"(\d{1,9})\.root\.json", re.ASCII)


@dataclass(frozen=True, slots=True)
class Keys:
    """What a new root is made of; a rotation adds keys to those that are there."""

    roots: Sequence[CryptoSigner]  # sign it; at first they are its keys
    new_roots: Sequence[CryptoSigner] = ()  # of a rotation: further keys of the root
    publishers: Sequence[Key] = ()  # beside those that sign
    refreshers: Sequence[Key] = ()  # may sign the timestamp alone
    retired: frozenset[str] = frozenset()  # names of keys that are taken out
    threshold: int | None = None  # signatures that publishing takes
    root_threshold: int | None = None
    lasts: timedelta = timedelta(days=730)


def create(folder: RegistryFolder, keys: Keys) -> Path:
    """Make a registry, empty, and return its first root, which readers trust.

    Without private keys of publishers the root is all that is made; who has one goes on.

    Raises
    ------
    OutputError
        There is a registry already, or it cannot be written.
    RecipeError
        There are fewer keys than signatures are asked for.
    """
    if folder.is_made:
        raise OutputError("is a registry already; see publish --rotate", path=folder.path)
    root = Root(version=1, expires=folder.now + keys.lasts, consistent_snapshot=True)
    _set_publishers(root, Root(), keys, [s.public_key for s in folder.signers])
    set_keys(root, Root.type, [s.public_key for s in keys.roots], keys.root_threshold or 1)
    if folder.signers:
        check_signers(root, Targets.type, folder.signers, "--key")
    try:
        folder.path.mkdir(exist_ok=True)
        folder.metadata.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot be made ({error.strerror})", path=folder.path) from error
    folder.forget()
    path = folder.metadata / "1.root.json"
    write_file(path, sign(root, keys.roots))
    if folder.signers:
        with folder.locked():
            folder.write(folder.read())
    return path


def rotate(folder: RegistryFolder, keys: Keys) -> Path:
    """Change keys, or how long the root lasts; the index is signed by the new keys at once.

    Returns the new root's path.

    Where enough of the old keys sign too, no reader is refused at any moment.

    Raises
    ------
    RecipeError
        The keys may not sign, or too few are left.
    VerificationError, OutputError
        As of `edgemerge.fleet.registry.publishing.publish`.
    """
    with folder.locked():
        draft = _read(folder)
        old = draft.root
        check_signers(old, Root.type, keys.roots, "--root-key")
        root = _changed(old, keys, folder)
        signers = [*keys.roots, *keys.new_roots]
        check_signers(root, Root.type, _able(root, Root.type, signers), "--new-root-key")
        check_signers(root, Targets.type, _able(root, Targets.type, folder.signers), "--key")
        made = f"{root.version}.root.json", sign(root, signers)
        folder.write(draft, made, root_first=not _can_sign(old, folder.signers))
    return folder.metadata / made[0]


def _read(folder: RegistryFolder) -> Draft:
    """Read the index, also where a rotation was killed after its root and before its timestamp."""
    try:
        return folder.read()
    except VerificationError:
        named = (_ROOT.fullmatch(path.name) for path in folder.metadata.iterdir())
        last = max((int(match[1]) for match in named if match), default=1)
        if last == 1:
            raise
        return folder.read_before(last)


def _changed(old: Root, keys: Keys, folder: RegistryFolder) -> Root:
    root = copy.deepcopy(old)
    root.version += 1
    root.expires = folder.now + keys.lasts
    _set_publishers(root, old, keys, [signer.public_key for signer in folder.signers])
    roots = [*_keys_of(old, Root.type), *(signer.public_key for signer in keys.new_roots)]
    threshold = keys.root_threshold or old.roles[Root.type].threshold
    set_keys(root, Root.type, _without(roots, keys.retired), threshold)
    return root


def _set_publishers(root: Root, old: Root, keys: Keys, signing: Sequence[Key]) -> None:
    """Name who may publish: who did, who signs now and who else is named, without who is retired."""
    publishers = _without([*_keys_of(old, Targets.type), *signing, *keys.publishers], keys.retired)
    threshold = keys.threshold or old.roles[Targets.type].threshold
    set_keys(root, Targets.type, publishers, threshold)
    set_keys(root, Snapshot.type, publishers, threshold)
    before = _keys_of(old, Timestamp.type)  # publishers too
    refreshers = _without([*before, *keys.refreshers, *publishers], keys.retired)
    set_keys(root, Timestamp.type, refreshers, 1)


def _keys_of(root: Root, role: str) -> list[Key]:
    return [root.get_key(keyid) for keyid in root.roles[role].keyids]


def _without(keys: Sequence[Key], retired: frozenset[str]) -> list[Key]:
    return [key for key in keys if key.keyid not in retired]


def _able(root: Root, role: str, signers: Sequence[CryptoSigner]) -> list[CryptoSigner]:
    return [one for one in signers if one.public_key.keyid in root.roles[role].keyids]


def _can_sign(root: Root, signers: Sequence[CryptoSigner]) -> bool:
    """Tell whether readers that know only this root would take what these keys sign."""
    given = {signer.public_key.keyid for signer in signers}
    roles = [root.roles[role] for role in PUBLISHING]
    return all(len(given & set(role.keyids)) >= role.threshold for role in roles)
