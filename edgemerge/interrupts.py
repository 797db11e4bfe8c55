"""Makes Ctrl-C end the command quietly while it starts, before it handles signals itself.

This is imported before everything else, which takes a few tenths of a second. Python would print a traceback.
A program that only imports the library keeps its own handling.
"""

from __future__ import annotations

import signal
import sys

__all__: list[str] = []


def _is_the_command() -> bool:
    """Tell whether this process is `edgemerge` or `python -m edgemerge`."""
    if sys.argv[:1] == ["-m"]:  # until Python has found the module
        after = sys.orig_argv[sys.orig_argv.index("-m") + 1 :] if "-m" in sys.orig_argv else []
        return after[:1] == ["edgemerge"]
    return any(sys.argv) and sys.argv[0].rpartition("/")[2] == "edgemerge"


# Leave SIGINT alone under nohup, and where another program has set a handler.
if _is_the_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
