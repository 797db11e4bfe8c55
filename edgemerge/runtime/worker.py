"""A thread for llama.cpp, so that the main one hears Ctrl-C.

Python handles signals on its main thread, between two instructions of its own. While that thread is inside
llama.cpp, a signal waits. Or it comes in the middle of a callback, such as that of the log. There its
exception is shown and lost.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import ParamSpec, TypeVar

from edgemerge.runtime.closing import Closing

__all__ = ["Worker"]

P = ParamSpec("P")
R = TypeVar("R")


class Worker(Closing):
    """One thread that does one thing after the other; use it in a `with` statement.

    Attributes
    ----------
    is_stopped : bool
        Whether what runs there should end; whoever runs it may ask.
    """

    def __init__(self) -> None:
        self.is_stopped = False
        self._thread = ThreadPoolExecutor(1, "llama.cpp")

    def close(self) -> None:
        """Stop what still runs, and wait for its end."""
        self.is_stopped = True
        self._thread.shutdown()

    def do(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Do something on the thread and give its result, or raise what it raises.

        Ctrl-C sets `is_stopped`, waits until the work has ended, and is raised then: nothing of it
        runs when the caller goes on.
        """
        self.is_stopped = False
        try:
            return self._thread.submit(work, *args, **kwargs).result()
        except KeyboardInterrupt:
            self.is_stopped = True
            is_ended = False
            while not is_ended:
                with suppress(KeyboardInterrupt):
                    # what is done last ends last, also where `submit` itself was interrupted
                    is_ended = self._thread.submit(lambda: True).result()
            raise
