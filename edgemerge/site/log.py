"""The log of a site: one JSON object a line, only ever appended to, each line bound to the one before.

`before` of a line is the start of the SHA-256 of the line before it (all bytes, without its newline). So a
line that is changed or taken out later shows. What a power cut left of a last line is cut off, and a new
line says so.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgemerge.errors import OutputError, VerificationError
from edgemerge.output.file import sync_folder
from edgemerge.site.record import now

__all__ = ["append_event", "last_events", "read_events"]

TAIL = 1 << 16  # bytes in which the last lines are looked for, at first
FIRST = ""  # `before` of the first line
HASH_DIGITS = 16


def append_event(path: Path, event: Mapping[str, Any]) -> None:
    """Write one event durably, with the time and the hash of the line before.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    is_new = not path.exists()
    try:
        fd = os.open(
            path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644
        )
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            before, n_lost = _mend(fd)
            if n_lost:
                before = _write(fd, {"event": "repaired", "lost_bytes": n_lost}, before)
            _write(fd, event, before)
            os.fsync(fd)
        finally:
            os.close(fd)
        if is_new:
            sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"could not be written ({error.strerror})", path=path) from error


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Yield all events, the oldest first; a torn last line, which a power cut may leave, is passed over.

    Raises
    ------
    VerificationError
        A line is not as it was written, or lines were taken out.
    """
    before = FIRST
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            event = _parse(line)
            if event is None and not file.read(1):
                return
            if event is None or event.get("before") != before:
                raise VerificationError(
                    f"line {number} was changed, or lines before it were taken out; "
                    "ask who can write to the folder",
                    path=path,
                )
            before = _hash(line)
            yield event


def last_events(path: Path, n_lines: int) -> list[dict[str, Any]]:
    """Return up to `n_lines` of the newest events, the oldest of them first; no line is checked."""
    try:
        with path.open("rb") as file:
            raw, start = _read_tail(file.fileno(), n_lines)
    except FileNotFoundError:
        return []
    lines = raw.splitlines(keepends=True)[1 if start else 0 :]
    events = [event for line in lines if (event := _parse(line)) is not None]
    return events[-n_lines:]


def _read_tail(fd: int, n_lines: int) -> tuple[bytes, int]:
    """Read the end of a file with at least so many whole lines, and where that end starts."""
    n_bytes, length = os.fstat(fd).st_size, TAIL
    while True:
        start = max(0, n_bytes - length)
        raw = os.pread(fd, n_bytes - start, start)
        if start == 0 or raw.count(b"\n") > n_lines + 1:
            return raw, start
        length *= 4


def _mend(fd: int) -> tuple[str, int]:
    """Cut off what is no whole line at the end; the hash of the last whole line, and the bytes cut off."""
    raw, _ = _read_tail(fd, 2)
    lines = raw.splitlines(keepends=True)
    n_lost = 0
    while lines and _parse(lines[-1]) is None:
        n_lost += len(lines.pop())
    if n_lost:
        os.ftruncate(fd, os.fstat(fd).st_size - n_lost)
    return (_hash(lines[-1]) if lines else FIRST), n_lost


def _write(fd: int, event: Mapping[str, Any], before: str) -> str:
    document = {"time": now(), **event, "before": before}
    text = json.dumps(document, ensure_ascii=False, allow_nan=False)
    line = text.encode(errors="backslashreplace") + b"\n"  # of a path: JSON's escapes
    at = 0
    while at < len(line):
        at += os.write(fd, line[at:])
    return _hash(line)


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the event of a whole line, None for anything else."""
    if not line.endswith(b"\n"):
        return None
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) else None


def _hash(line: bytes) -> str:
    return hashlib.sha256(line.rstrip(b"\n")).hexdigest()[:HASH_DIGITS]
