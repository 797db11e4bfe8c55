"""`edgemerge rpc-worker`: computes layers of models that other boards run."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from edgemerge.cli import loading
from edgemerge.cli.terminal import talks_plainly

__all__ = ["rpc_worker_command"]


@talks_plainly
def rpc_worker_command(
    listen: Annotated[
        str, typer.Option("--listen", metavar="HOST:PORT", help="Address to listen on.")
    ] = "127.0.0.1:50052",
    threads: loading.Threads = None,
    i_trust_this_network: loading.TrustNetwork = False,
) -> None:
    """Compute layers of a model for a board that runs it with --rpc.

    It serves one process at a time, until it is stopped. What is sent is neither encrypted nor checked.
    """
    from edgemerge.runtime.rpc.addresses import check_trust, read_address
    from edgemerge.runtime.rpc.worker import work

    address = read_address(listen)
    check_trust(address, is_trusted=i_trust_this_network)
    _keep_stdout()
    work(address, threads, _announce)


def _keep_stdout() -> None:
    """Keep standard output from ggml's server, which prints there as it likes."""
    sys.stdout = os.fdopen(os.dup(1), "w")
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)


def _announce(address: str, n_threads: int) -> None:
    threads = f"{n_threads} thread{'s' * (n_threads > 1)}"
    print(f"edgemerge rpc-worker listens at {address} ({threads})", flush=True)
