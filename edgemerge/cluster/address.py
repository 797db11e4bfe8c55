"""What `--cluster` may be given, and how Dask is set for our processes."""

from __future__ import annotations

import logging
import re
import warnings
from importlib.util import find_spec

from edgemerge.errors import ClusterError, RecipeError

__all__ = ["count_local", "prepare_dask", "read_cluster"]

EXTRA = "pip install 'edgemerge[cluster]'"
MAX_LOCAL = 256
_ADDRESS = re.compile(r"(?:tcp|tls)://\S+:\d{1,5}", re.ASCII)
_LOCAL = re.compile(r"local:(\d{1,4})", re.ASCII)
# Our budget bounds the memory of a worker. Dask would stop taking tasks, or end the process, well below.
SETTINGS = {
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
    "distributed.worker.profile.enabled": False,
    "distributed.admin.large-graph-warning-threshold": "1TB",
}
LOGGERS = ("distributed", "distributed.client", "distributed.worker", "tornado.application")


def read_cluster(text: str) -> str:
    """Check the address of a scheduler, or `local:N`.

    Raises
    ------
    RecipeError
        It is neither.
    """
    if count_local(text) is None and not _ADDRESS.fullmatch(text):
        raise RecipeError(
            f"{text[:80]!r} is no cluster; give its scheduler as tcp://HOST:PORT or tls://HOST:PORT, or "
            "local:N for N processes on this machine",
            field="cluster",
        )
    return text


def count_local(text: str) -> int | None:
    """Return how many processes of this machine a cluster is; None for any other cluster.

    Raises
    ------
    RecipeError
        None, or too many.
    """
    match = _LOCAL.fullmatch(text)
    if match is None:
        return None
    if not 1 <= int(match[1]) <= MAX_LOCAL:
        raise RecipeError(f"{text}: give 1 to {MAX_LOCAL} processes", field="cluster")
    return int(match[1])


def prepare_dask() -> None:
    """Set Dask for this process and those that it starts: no limits beside ours, no logs.

    Raises
    ------
    ClusterError
        Dask is not installed.
    """
    if find_spec("distributed") is None or find_spec("cryptography") is None:
        raise ClusterError(f"a cluster needs Dask's distributed: {EXTRA}")
    import dask
    import distributed  # noqa: F401  (sets the levels of its logs when it is imported)

    dask.config.set(SETTINGS)
    warnings.filterwarnings("ignore", module=r"(?:dask|distributed)\.")
    for name in LOGGERS:  # what matters is said in one sentence of ours
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
