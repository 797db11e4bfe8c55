"""What a hostile file may cost."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable

__all__ = ["bounded"]

MAX_SECONDS = 1.0
MAX_BYTES = 64 << 20


def bounded(action: Callable[[], object]) -> None:
    """Run within a second of the processor and 64 MiB of Python's and NumPy's memory."""
    tracemalloc.start()
    start = time.process_time()
    try:
        action()
    finally:
        seconds = time.process_time() - start
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert seconds < MAX_SECONDS
    assert peak < MAX_BYTES
