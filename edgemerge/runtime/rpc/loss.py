"""What happens when an rpc worker is lost: ggml ends the process, and its last words say which it was.

ggml calls `abort` where a worker does not answer as it should (RPC_STATUS_ASSERT of ggml-rpc.cpp). Before
that it calls a function of ours, on whatever thread this happens.
"""

from __future__ import annotations

import ctypes
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress

from edgemerge.runtime.rpc.addresses import split

__all__ = ["explain", "read_last_words", "watch"]

_LOST = "edgemerge: "  # begins the last line of a process that ended so
_CONNECT_SECONDS = 2.0
_END_SECONDS, _LOOK_SECONDS = 1.0, 0.05
_STATUS = 1  # of a process that ended with an error of ours
_Callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
_callbacks: list[object] = []  # C keeps the pointer alone


def watch(ggml: ctypes.CDLL, addresses: Sequence[str]) -> None:
    """End this process with one sentence, not with ggml's abort, when a worker is lost.

    Parameters
    ----------
    ggml : CDLL
        The loaded ggml.
    addresses : sequence of str
        `ADDRESS:PORT` of the workers.
    """

    def end(message: bytes) -> None:
        text = message.decode("utf-8", errors="replace")
        if "RPC" not in text and "Failed to connect" not in text:
            _write(text)  # another assertion: abort() follows
            return
        before = "\n" if os.isatty(2) else ""  # the cursor may stand after a half answer
        _write(f"{before}{_LOST}{explain(text, addresses)}")
        os._exit(_STATUS)

    callback = _Callback(end)
    _callbacks.append(callback)
    ggml.ggml_set_abort_callback.argtypes = [_Callback]
    ggml.ggml_set_abort_callback.restype = ctypes.c_void_p
    ggml.ggml_set_abort_callback(callback)


def _write(line: str) -> None:
    with suppress(OSError):
        os.write(2, f"{line}\n".encode())


def explain(message: str, addresses: Sequence[str]) -> str:
    """Say in one sentence what ggml's message means, and which workers do not answer any more.

    Parameters
    ----------
    message : str
        What ggml was about to print.
    addresses : sequence of str
        `ADDRESS:PORT` of the workers.
    """
    if "handshake" in message:
        remedy = "install the same llama-cpp-python on all boards"
        return f"{_name(addresses)} speaks another version of ggml's protocol: {remedy}"
    if lost := _find_lost(addresses):
        return f"{_name(lost)} is gone: start it again with edgemerge rpc-worker"
    return f"{_name(addresses)} broke the connection: see what it says there, and start it again"


def _find_lost(addresses: Sequence[str]) -> list[str]:
    """Find those that nobody listens at; a process that ends may close that socket last."""
    end = time.monotonic() + _END_SECONDS
    lost: list[str] = []
    while not lost and time.monotonic() < end:
        lost = [address for address in addresses if not _listens(address)]
        time.sleep(_LOOK_SECONDS)
    return lost


def _name(addresses: Sequence[str]) -> str:
    return f"the rpc worker at {' or '.join(addresses)}"


def _listens(address: str) -> bool:
    try:
        socket.create_connection(split(address), _CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def read_last_words(written: str) -> str | None:
    """Find the sentence in what a process wrote before its end; None where it ended otherwise."""
    last = written.strip().rpartition("\n")[2]
    return last.removeprefix(_LOST) if last.startswith(_LOST) else None
