"""`edgemerge worker`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from edgemerge.cli.terminal import plain, talks_plainly

__all__ = ["worker_command"]


@talks_plainly
def worker_command(
    address: Annotated[
        str,
        typer.Argument(
            metavar="ADDRESS", help="The scheduler: tcp://HOST:PORT or tls://HOST:PORT."
        ),
    ],
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads", min=1, metavar="N", help="Tensors at a time [default: all cores]."
        ),
    ] = None,
    memory: Annotated[
        str,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="Budget of the process for merges; models that are asked are loaded whole, whatever it is.",
        ),
    ] = "512MiB",
    niceness: Annotated[
        int,
        typer.Option(
            "--nice", min=0, max=19, metavar="N", help="How far other processes come first."
        ),
    ] = 10,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--directory", metavar="DIR", help="Folder for temporary files [default: Dask's own]."
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(
            "--host",
            metavar="ADDRESS",
            help="Address of this machine to listen on [default: the one that reaches the scheduler].",
        ),
    ] = None,
) -> None:
    """Do a part of what others start with --cluster, until it is stopped.

    It makes tensors for merge. For eval and search it loads whole models and asks them.
    """
    from edgemerge.cluster.address import count_local, read_cluster
    from edgemerge.cluster.worker import run_worker
    from edgemerge.merging.run import usable_processors
    from edgemerge.sizes import parse_size

    if count_local(read_cluster(address)) is not None:
        raise typer.BadParameter("a worker needs the address of a scheduler, as tcp://HOST:PORT")
    if directory is not None and not directory.is_dir():
        raise typer.BadParameter(f"--directory {directory}: there is no such folder")
    run_worker(
        address,
        threads=threads or usable_processors(),
        memory=parse_size(memory),
        niceness=niceness,
        folder=directory,
        host=host,
        say=_say,
    )


def _say(sentence: str) -> None:
    print(plain(sentence), file=sys.stderr, flush=True)
