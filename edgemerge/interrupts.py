"""Ctrl-C at moments when nobody listens: before the command has begun to, and while files are made.

Imported before everything else, which takes a few tenths of a second; Python would answer with a traceback.
A program that only imports the library keeps its own way.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["hold_interrupts"]

STOPS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


@contextmanager
def hold_interrupts() -> Iterator[None]:
    """Let Ctrl-C and requests to end wait: one between making a file and taking care of it would leave it.

    Threads that are started meanwhile never see these signals.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _is_the_command() -> bool:
    """Tell whether this process is `edgemerge` or `python -m edgemerge`."""
    if sys.argv[:1] == ["-m"]:  # until Python has found the module
        after = sys.orig_argv[sys.orig_argv.index("-m") + 1 :] if "-m" in sys.orig_argv else []
        return after[:1] == ["edgemerge"]
    return any(sys.argv) and sys.argv[0].rpartition("/")[2] == "edgemerge"


# Not so under nohup, nor where somebody else has a say in it already.
if _is_the_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
