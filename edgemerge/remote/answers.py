"""Answers of a server: what they say of a file, checked, and one that is a whole file."""

from __future__ import annotations

import http.client
import re
from io import RawIOBase
from pathlib import Path

from edgemerge.remote.failures import Fault, Refusal, refuse_disk, refuse_status
from edgemerge.remote.ranged import PIECE

__all__ = ["CUT_OFF", "OTHER_BYTES", "read_length", "read_marks", "read_range", "receive_whole"]

# No file system has files of 10 TB and more; longer numbers would be none of Python's or the system's.
_SIZE = re.compile(r"\d{1,13}", re.ASCII)
_RANGE = re.compile(r"bytes (\d{1,13})-(\d{1,13})/(\d{1,13})", re.ASCII)
OTHER_BYTES = "comes from a server that sends other bytes than it was asked for"
CUT_OFF = "the connection was closed in the middle of an answer"


def read_marks(response: http.client.HTTPResponse) -> tuple[str | None, str | None]:
    """Return by what an answer says that its file is known: ETag and Last-Modified."""
    return response.headers.get("ETag"), response.headers.get("Last-Modified")


def read_length(response: http.client.HTTPResponse) -> int | None:
    """Return the size of a whole file that an answer states, if it does.

    Raises
    ------
    Refusal
        No file has such a size.
    """
    stated = response.headers.get("Content-Length", "")
    if not stated.isdecimal():
        return None
    if not _SIZE.fullmatch(stated):
        raise Refusal("comes from a server that states a size which no file has; get another")
    return int(stated)


def read_range(response: http.client.HTTPResponse) -> tuple[int, int, int]:
    """Return first byte, last + 1 and the size of the whole file that an answer states.

    Raises
    ------
    Refusal, Fault
        It holds no range.
    """
    if response.status == 200:
        raise Refusal(
            "comes from a server that does not send ranges of bytes; download it and give its path"
        )
    if response.status != 206:
        raise refuse_status(response.status, response.headers.get("Retry-After"))
    match = _RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
    if match is None:
        raise Refusal(
            "comes from a server that does not say which bytes it sends; download it and give its path"
        )
    return int(match[1]), int(match[2]) + 1, int(match[3])


def receive_whole(
    response: http.client.HTTPResponse, file: RawIOBase, folder: Path, max_bytes: int
) -> None:
    """Write an answer that is a whole file.

    Parameters
    ----------
    response : HTTPResponse
        With the status 200 or 206.
    file : file
        Open to write, without a buffer.
    folder : Path
        In which it is.
    max_bytes : int
        Its largest size.

    Raises
    ------
    Refusal, OSError, HTTPException
        It is larger, or is no whole file.
    OutputError
        There is no room for it.
    """
    too_large = Refusal(
        f"is larger than {max_bytes / 1e6:g} MB, which no such file is; get another"
    )
    at, whole = 0, None
    if response.status == 206:
        first, end, whole = read_range(response)
        if whole > max_bytes:
            raise too_large
        if first != 0:
            raise Refusal(OTHER_BYTES)
        if end != whole:
            raise Fault("the server sends less than it was asked for")
    while raw := response.read(PIECE):
        if (at := at + len(raw)) > max_bytes:
            raise too_large
        try:
            while raw:  # the network's errors are OSErrors, too
                raw = raw[file.write(raw) or 0 :]
        except OSError as error:
            raise refuse_disk(error, folder) from None
    if response.length or whole not in (None, at):  # `read` alone does not tell
        raise Fault(CUT_OFF)
