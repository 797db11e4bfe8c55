"""Ed25519 keys on disk: PEM files as openssl writes them, the private one for its owner alone.

`cryptography` is an extra and imported when a key is used; without it, one sentence says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from edgemerge.errors import FormatError, OutputError, RuntimeFailure
from edgemerge.formats.files import read_bounded
from edgemerge.suggestions import suggest_path

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

__all__ = ["create_keys", "is_signed_by", "key_id", "read_private_key", "read_public_key"]

MAX_BYTES = 1 << 14
KEYGEN = "make a pair with edgemerge keygen"
OTHERS = stat.S_IRWXG | stat.S_IRWXO


def create_keys(name: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Make a pair of keys: NAME.pem, which only its owner may read, and NAME.pub.pem.

    Raises
    ------
    OutputError
        One of them is there already, or cannot be written.
    RuntimeFailure
        `cryptography` is not installed.
    """
    _require_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    if Path(name).name in ("", ".."):
        raise OutputError("names no file; give one such as ward, for ward.pem", path=name)
    private, public = Path(f"{os.fspath(name)}.pem"), Path(f"{os.fspath(name)}.pub.pem")
    if os.path.lexists(public):
        raise _exists(public)
    key = Ed25519PrivateKey.generate()
    _create(
        private, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), mode=0o600
    )
    try:
        _create(public, _public_pem(key.public_key()), mode=0o644)
    except BaseException:
        private.unlink()
        raise
    return private, public


def read_private_key(path: str | os.PathLike[str]) -> Ed25519PrivateKey:
    """Read the key that signs.

    Raises
    ------
    FormatError
        It is none, has a passphrase, or others than its owner can read it.
    RuntimeFailure
        `cryptography` is not installed.
    """
    _require_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    path = Path(path)
    raw = _read(path)
    if b"PUBLIC KEY-----" in raw:
        raise FormatError("is a public key; sign with the private one", path=path)
    if path.stat().st_mode & OTHERS:
        raise FormatError(
            "is a private key that others than its owner may read; chmod 600 it, or make a new "
            "pair if others had access",
            path=path,
        )
    try:
        key = load_pem_private_key(raw, password=None)
    except TypeError as error:
        raise FormatError(
            "has a passphrase, which edgemerge does not ask for; decrypt it with openssl pkey",
            path=path,
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise FormatError(f"is no private key in PEM; {KEYGEN}", path=path) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise FormatError(f"is no Ed25519 key; {KEYGEN}", path=path)
    return key


def read_public_key(path: str | os.PathLike[str]) -> Ed25519PublicKey:
    """Read the key that signatures are checked with; every byte of the file has to be right.

    Raises
    ------
    FormatError
        It is none, or not as openssl writes it.
    RuntimeFailure
        `cryptography` is not installed.
    """
    _require_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    path = Path(path)
    raw = _read(path)
    if b"PRIVATE KEY-----" in raw:
        raise FormatError(
            "is a private key; give the public one, and keep this where only its owner reads it",
            path=path,
        )
    try:
        key = load_pem_public_key(raw)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise FormatError(f"is no public key in PEM; {KEYGEN}", path=path) from error
    if not isinstance(key, Ed25519PublicKey):
        raise FormatError(f"is no Ed25519 key; {KEYGEN}", path=path)
    if _public_pem(key) != raw:
        raise FormatError(
            "holds more than the key, or is damaged; write it anew with openssl pkey -pubin",
            path=path,
        )
    return key


def key_id(key: Ed25519PublicKey) -> str:
    """Name a key: the first half of the SHA-256 of its 32 bytes, in hexadecimal."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:32]


def is_signed_by(key: Ed25519PublicKey, signature: bytes, message: bytes) -> bool:
    """Tell whether a signature is the key's, of this message."""
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, message)
    except InvalidSignature:
        return False
    return True


def _require_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise RuntimeFailure(
            "signatures need cryptography: install it with pip install 'edgemerge[sign]'"
        ) from error


def _public_pem(key: Ed25519PublicKey) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _read(path: Path) -> bytes:
    if not path.is_file():  # a named pipe in the place of a key must not hang us
        hint = suggest_path(path) or "; give a key in PEM"
        raise FormatError(f"there is no such file{hint}", path=path)
    return read_bounded(path, MAX_BYTES)


def _create(path: Path, raw: bytes, *, mode: int) -> None:
    """Write a file that must not be there yet."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError as error:
        raise _exists(path) from error
    except OSError as error:
        raise OutputError(f"cannot be written ({error.strerror})", path=path) from error
    try:
        with open(fd, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise OutputError(f"cannot be written ({error.strerror})", path=path) from error


def _exists(path: Path) -> OutputError:
    return OutputError(
        "exists already, and a key is never replaced; choose another name", path=path
    )
