"""Memory for work beside the server: what the machine has to give, and what the models then may not take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from edgemerge.machine.process import read_process
from edgemerge.runtime.board.device import read_memory
from edgemerge.runtime.serve.store import ModelStore

__all__ = ["free_room", "reserved"]

_USED_PART = 0.9  # of what is free: other programs live here too


def free_room(models: ModelStore) -> int:
    """Bytes that work beside the server may take.

    Free is what the system can give, less what the loaded models have been promised and do not yet use.
    """
    promised = max(0, models.taken - _resident(models))
    return max(0, int(_USED_PART * (read_memory().available - promised)))


@contextmanager
def reserved(models: ModelStore, n_bytes: int) -> Iterator[None]:
    """Keep room free of models until the block ends.

    The server may take its whole budget. Only what lies outside of that is free for others for certain; the
    rest is taken from the budget meanwhile.
    """
    outside = max(0, read_memory().available - (models.budget - _resident(models)))
    models.reserved = max(0, n_bytes - outside)
    try:
        yield
    finally:
        models.reserved = 0
        models.changed()


def _resident(models: ModelStore) -> int:
    return read_process().rss + sum(read_process(pid).rss for pid in models.pids)
