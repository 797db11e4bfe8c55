"""Keys of `edgemerge keygen` as python-tuf takes them; a key has the same name in both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from securesystemslib.signer import CryptoSigner, Key, SSlibKey
from tuf.api.metadata import Root, Snapshot, Targets, Timestamp

from edgemerge.errors import RecipeError
from edgemerge.provenance.keys import key_id, read_private_key, read_public_key

__all__ = ["PUBLISHING", "check_signers", "read_publishers", "read_signers", "set_keys"]

PUBLISHING = (Targets.type, Snapshot.type, Timestamp.type)  # roles of a publisher's keys


def read_signers(paths: Iterable[Path]) -> list[CryptoSigner]:
    """Read private keys.

    Raises
    ------
    FormatError
        One is none, or others may read it.
    """
    keys = [read_private_key(path) for path in paths]
    return [CryptoSigner(key, _public(key.public_key())) for key in keys]


def read_publishers(paths: Iterable[Path]) -> list[Key]:
    """Read public keys.

    Raises
    ------
    FormatError
        One is none.
    """
    return [_public(read_public_key(path)) for path in paths]


def set_keys(root: Root, role: str, keys: Sequence[Key], threshold: int) -> None:
    """Give a role these keys and no others.

    Raises
    ------
    RecipeError
        There are fewer than `threshold`.
    """
    named = {key.keyid: key for key in keys}
    if len(named) < threshold:
        raise RecipeError(
            f"the role {role} would have {len(named)} keys, and {threshold} signatures are asked for; name "
            "more keys"
        )
    for old in set(root.roles[role].keyids) - named.keys():
        root.revoke_key(old, role)
    for key in named.values():
        root.add_key(key, role)
    root.roles[role].threshold = threshold


def check_signers(root: Root, role: str, signers: Sequence[CryptoSigner], option: str) -> None:
    """Refuse keys that may not sign for a role, or too few of them.

    Raises
    ------
    RecipeError
        As it says; `option` names what the user gives keys by.
    """
    known, threshold = root.roles[role].keyids, root.roles[role].threshold
    for signer in signers:
        if signer.public_key.keyid not in known:
            raise RecipeError(
                f"the key {signer.public_key.keyid} may not sign here: the registry's root names "
                f"{', '.join(known)}; give one of these with {option}, or change them with --rotate"
            )
    given = len({signer.public_key.keyid for signer in signers})
    if given < threshold:
        raise RecipeError(
            f"the registry asks for {threshold} signatures and {given} keys are given; repeat {option}"
        )


def _public(key: Ed25519PublicKey) -> SSlibKey:
    return SSlibKey.from_crypto(key, keyid=key_id(key))
