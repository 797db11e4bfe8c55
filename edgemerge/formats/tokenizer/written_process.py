"""Tokenizer files of a large vocabulary made in a process of their own, which is gone before a merge begins.

Python's objects for 128 000 tokens and their merges take more than 100 MB; the files have 17.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from edgemerge.errors import FormatError, RuntimeFailure
from edgemerge.formats.tokenizer.written import tokenizer_files

__all__ = ["write_tokenizer"]

LARGE = 1 << 19  # bytes of metadata; for fewer a process takes longer than it saves memory
PREFIX = "tokenizer."

# What was made last, and of which metadata.
_last: tuple[bytes, dict[str, bytes]] = b"", {}


def write_tokenizer(
    path: Path, metadata: Mapping[str, bytes], context_length: int
) -> dict[str, bytes]:
    """Return what `tokenizer_files` does; what was made last is made once.

    Raises
    ------
    FormatError
        As there.
    RuntimeFailure
        The process could not be started, or ended without an answer.
    """
    global _last
    own = {key: value for key, value in metadata.items() if key.startswith(PREFIX)}
    digest = hashlib.blake2b(repr((str(path), context_length, list(own))).encode())
    for value in own.values():
        digest.update(hashlib.blake2b(value).digest())
    if digest.digest() != _last[0]:
        _last = b"", {}  # before there are two
        _last = digest.digest(), _write(path, own, context_length)
    return _last[1]


def _write(path: Path, metadata: Mapping[str, bytes], context_length: int) -> dict[str, bytes]:
    if sum(map(len, metadata.values())) < LARGE:
        return tokenizer_files(path, metadata, context_length)
    # Files, as a pipe's contents would be in memory twice.
    with TemporaryFile() as question, TemporaryFile() as answer:
        _pack(question, {"path": str(path), "context_length": context_length}, metadata)
        question.seek(0)
        try:
            subprocess.run(
                # With -P nothing in the user's folder is taken for a module.
                [sys.executable, "-P", "-m", "edgemerge.formats.tokenizer.written_process"],
                stdin=question,
                stdout=answer,
                stderr=subprocess.DEVNULL,
                check=False,
            )
        except OSError as error:
            reason = error.strerror
            raise RuntimeFailure(
                f"{path}: no process to write its tokenizer can be started ({reason})"
            ) from error
        answer.seek(0)
        try:
            head, files = _unpack(answer)
        except ValueError:
            raise RuntimeFailure(
                f"{path}: the process that wrote its tokenizer ended; free some memory"
            ) from None
    if "refusal" in head:
        raise FormatError(str(head["refusal"]).removeprefix(f"{path}: "), path=path)
    return files


def _pack(target: IO[bytes], head: dict[str, object], values: Mapping[str, bytes]) -> None:
    """Write a line of JSON, then the values one after the other."""
    sizes = [(key, len(value)) for key, value in values.items()]
    target.write(json.dumps({**head, "sizes": sizes}).encode() + b"\n")
    target.writelines(values.values())


def _unpack(source: IO[bytes]) -> tuple[dict[str, object], dict[str, bytes]]:
    head = json.loads(source.readline())
    return head, {key: source.read(n_bytes) for key, n_bytes in head["sizes"]}


def _answer(source: IO[bytes], target: IO[bytes]) -> None:
    head, metadata = _unpack(source)
    path, length = Path(str(head["path"])), int(str(head["context_length"]))
    try:
        files = tokenizer_files(path, metadata, length)
    except FormatError as error:
        _pack(target, {"refusal": str(error)}, {})
        return
    _pack(target, {}, files)


if __name__ == "__main__":
    _answer(sys.stdin.buffer, sys.stdout.buffer)
