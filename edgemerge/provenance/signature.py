"""Signatures of model files: that every byte is what the holder of a key signed.

A signature is a file of its own, FILE.sig beside the model (of a split, beside its first file), so that
the model stays what it was. It is text:

    edgemerge signature 1
    key 4fd1...                 name of the public key (`edgemerge.provenance.keys.key_id`)
    file 9f86... 1234           SHA-256 and bytes of each file of the model, in order
    ed25519 5e1b...             signature (RFC 8032) of all the lines before it

The first line keeps what is signed here from meaning anything elsewhere. There is one spelling of it, and
no other is read. The names of the files are not signed: a model may be renamed, together with its .sig.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgemerge.errors import FormatError, VerificationError
from edgemerge.formats.files import read_bounded
from edgemerge.formats.gguf.model import parts_of
from edgemerge.formats.gguf.split import MAX_PARTS
from edgemerge.output.file import check_output, write_file
from edgemerge.provenance.keys import is_signed_by, key_id
from edgemerge.types import Progress

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

__all__ = ["Signed", "check_signature", "read_signer", "sign_model", "signature_path"]

DOMAIN = "edgemerge signature 1"
CHUNK = 1 << 20
LINE_BYTES = 128  # at least as long as any line but the last
MAX_BYTES = (MAX_PARTS + 3) * LINE_BYTES
_FORM = re.compile(
    rf"(?P<message>{DOMAIN}\n"
    r"key (?P<key>[0-9a-f]{32})\n"
    r"(?P<files>(?:file [0-9a-f]{64} (?:0|[1-9][0-9]{0,18})\n)+))"
    r"ed25519 (?P<signature>[0-9a-f]{128})\n",
    re.ASCII,
)

# Device, inode, bytes, and when contents and inode last changed: another file, or a changed one, differs.
_State = tuple[int, int, int, int, int]


@dataclass(frozen=True, slots=True)
class _Digest:
    """One file as it was read."""

    path: Path
    n_bytes: int
    sha256: str
    state: _State

    @property
    def line(self) -> str:
        """What a signature says of it."""
        return f"file {self.sha256} {self.n_bytes}\n"


@dataclass(frozen=True, slots=True)
class Signed:
    """A model whose signature is good, as its files were when that was seen."""

    path: Path  # of the signature
    key: str  # name of the key that signed
    files: tuple[_Digest, ...]

    def check_unchanged(self) -> None:
        """Do nothing if the files are still those that were checked, going by inode and times.

        Called after another program has opened them by name, it closes the gap between check and use
        as far as that can be done from outside: who can write to the folder's parents, or sets the
        clock, can still deceive it.

        Raises
        ------
        VerificationError
            One is another file now, or was written to.
        FormatError
            One is gone.
        """
        for file in self.files:
            if _state(_stat(file.path)) != file.state:
                raise VerificationError(
                    "changed while it was loaded, after its signature was checked; see who writes "
                    "there, and start again",
                    path=file.path,
                )


def signature_path(path: str | os.PathLike[str]) -> Path:
    """Say where a model's signature is: beside its file, or the first file of a split.

    Raises
    ------
    FormatError
        The path names no file.
    """
    first = parts_of(Path(path))[0]
    if not first.name:
        raise FormatError("is a folder; give a model's file", path=path)
    return first.with_name(first.name + ".sig")


def sign_model(
    path: str | os.PathLike[str],
    key: Ed25519PrivateKey,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Sign every byte of a model.

    Parameters
    ----------
    path : path
        A file; of a split, any part.
    key : Ed25519PrivateKey
        From `edgemerge.provenance.keys.read_private_key`.
    force : bool
        Replace a signature that is there.
    progress : callable, optional
        Called with bytes done and bytes in all.

    Returns
    -------
    Path
        The signature's.

    Raises
    ------
    FormatError
        A file is missing, or none.
    OutputError
        There is a signature already, or it cannot be written.
    """
    target = signature_path(path)
    check_output(target, (), force=force)
    digests = _read_digests(parts_of(Path(path)), progress)
    message = f"{DOMAIN}\nkey {key_id(key.public_key())}\n{_lines(digests)}"
    signature = key.sign(message.encode())
    write_file(target, f"{message}ed25519 {signature.hex()}\n".encode())
    return target


def check_signature(
    path: str | os.PathLike[str], key: Ed25519PublicKey, *, progress: Progress | None = None
) -> Signed:
    """See that every byte of a model is what was signed with a key.

    Parameters
    ----------
    path : path
        A file; of a split, any part.
    key : Ed25519PublicKey
        From `edgemerge.provenance.keys.read_public_key`.
    progress : callable, optional
        Called with bytes done and bytes in all.

    Raises
    ------
    VerificationError
        There is no signature, it is damaged or another key's, or the model changed since.
    FormatError
        A file of the model is missing, or none.
    """
    files = parts_of(Path(path))
    target = signature_path(path)
    if not target.is_file():
        _stat(files[0])
        raise VerificationError(
            f"has no signature: there is no {target.name} beside it; get that too, or make one with "
            "edgemerge sign",
            path=path,
        )
    match = _FORM.fullmatch(read_bounded(target, MAX_BYTES).decode("ascii", "replace"))
    if match is None:
        raise VerificationError(
            "is damaged, or no signature that edgemerge wrote; get it again", path=target
        )
    wanted = key_id(key)
    if match["key"] != wanted:
        raise VerificationError(
            f"is a signature by the key {match['key']}, not by {wanted}; give the signer's public "
            "key, or get the model from whom you trust",
            path=target,
        )
    if not is_signed_by(key, bytes.fromhex(match["signature"]), match["message"].encode()):
        raise VerificationError(
            "is forged or damaged: the key did not make this signature; get it again", path=target
        )
    digests = _read_digests(files, progress)
    if _lines(digests) != match["files"]:
        stated = match["files"].splitlines(keepends=True)
        changed = (d.path for d, line in zip(digests, stated, strict=False) if d.line != line)
        raise VerificationError(
            "is not what was signed: it changed since; get the file again, with its signature",
            path=next(changed, files[0]),
        )
    return Signed(target, wanted, digests)


def read_signer(path: str | os.PathLike[str]) -> str | None:
    """Name the key that a model's signature says it is by, None where there is none; nothing is checked.

    Raises
    ------
    FormatError
        The path names no file.
    """
    target = signature_path(path)
    if not target.is_file():
        return None
    match = _FORM.fullmatch(read_bounded(target, MAX_BYTES).decode("ascii", "replace"))
    return None if match is None else match["key"]


def _lines(digests: Sequence[_Digest]) -> str:
    return "".join(digest.line for digest in digests)


def _read_digests(paths: Sequence[Path], progress: Progress | None) -> tuple[_Digest, ...]:
    """Hash files, with `CHUNK` bytes of memory."""
    total = sum(_stat(path).st_size for path in paths)
    digests: list[_Digest] = []
    for path in paths:
        before = sum(digest.n_bytes for digest in digests)
        digests.append(_read_digest(path, before, total, progress))
    return tuple(digests)


def _read_digest(path: Path, before: int, total: int, progress: Progress | None) -> _Digest:
    _stat(path)  # not a named pipe, at which `open` would wait
    sha256, n_bytes, view = hashlib.sha256(), 0, memoryview(bytearray(CHUNK))
    with open(path, "rb", buffering=0) as file:
        state = _state(os.fstat(file.fileno()))
        while n_read := file.readinto(view):
            sha256.update(view[:n_read])
            n_bytes += n_read
            if progress is not None:
                progress(before + n_bytes, total)
        if _state(os.fstat(file.fileno())) != state:
            raise FormatError("changed while it was read; wait for its writer", path=path)
    return _Digest(path, n_bytes, sha256.hexdigest(), state)


def _stat(path: Path) -> os.stat_result:
    try:
        status = os.stat(path)
    except OSError as error:
        raise FormatError(
            f"cannot be read ({error.strerror}); check the path", path=path
        ) from error
    if stat.S_ISDIR(status.st_mode):
        raise FormatError("is a folder, and only files such as a GGUF are signed", path=path)
    if not stat.S_ISREG(status.st_mode):
        raise FormatError("is no regular file; give a model's file", path=path)
    return status


def _state(status: os.stat_result) -> _State:
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )
