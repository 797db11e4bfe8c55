"""Ctrl-C before the command has begun to listen: a quiet end, as of any program.

Imported first. Importing the rest takes a few tenths of a second, in which Python would answer with a
traceback. A program that only imports the library keeps its own way.
"""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import PurePath

__all__: list[str] = []


def _is_the_command() -> bool:
    """Tell whether this process is `edgemerge` or `python -m edgemerge`."""
    started, given = sys.argv[:1], sys.orig_argv
    if started == ["-m"]:  # until the module is found
        return "edgemerge" in given[given.index("-m") + 1 :][:1] if "-m" in given else False
    return bool(started) and PurePath(started[0]).name == "edgemerge"


if (
    _is_the_command()
    and threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not so under nohup
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
