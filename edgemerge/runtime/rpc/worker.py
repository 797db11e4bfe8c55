"""An rpc worker: ggml's server on a thread, so that the main one hears signals."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from threading import Thread

from edgemerge.errors import RuntimeFailure
from edgemerge.runtime.board.device import default_threads
from edgemerge.runtime.library import load_library
from edgemerge.runtime.rpc.addresses import split
from edgemerge.runtime.rpc.backend import keep_alive, load_backend

__all__ = ["work"]

_LOOK_SECONDS = 0.05
_START_SECONDS = 30.0


def work(address: str, n_threads: int | None, started: Callable[[str, int], None]) -> None:
    """Compute for others until this process is stopped by a signal.

    Parameters
    ----------
    address : str
        `ADDRESS:PORT` to listen on.
    n_threads : int or None
        Threads that compute; None for the cores.
    started : function
        Called with the address and the threads, once it listens.

    Raises
    ------
    RuntimeFailure
        llama.cpp is not installed or has no RPC backend, or the address cannot be listened on.
    """
    backend = load_backend(load_library())
    n_threads = n_threads or default_threads()
    _check_address(address)
    thread = Thread(target=backend.serve, args=(address, n_threads), daemon=True)
    thread.start()
    end = time.monotonic() + _START_SECONDS
    while not keep_alive([address]) and thread.is_alive() and time.monotonic() < end:
        time.sleep(_LOOK_SECONDS)
    if thread.is_alive():
        started(address, n_threads)
    thread.join()
    raise RuntimeFailure(f"{address}: ggml's server has ended: start edgemerge rpc-worker again")


def _check_address(address: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(split(address))
        except OSError as error:
            raise RuntimeFailure(
                f"{address} cannot be listened on ({error.strerror}): give another address or port "
                "with --listen"
            ) from error
