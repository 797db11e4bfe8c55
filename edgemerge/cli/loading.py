"""Options of all commands that run a model: threads, context, GPU, LoRA."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from edgemerge.cluster.connection import Connection
    from edgemerge.runtime.llama import Lora, Model

__all__ = ["MAX_THREADS", "ContextSize", "GpuLayers", "Loras", "Rpc", "Threads", "TrustNetwork"]
__all__ += ["load", "open_answering", "parse_loras", "parse_rpc"]

MAX_THREADS = 512  # GGML_MAX_N_THREADS of ggml.h; llama.cpp crashes with more

Threads = Annotated[
    int | None,
    typer.Option(
        "-t",
        "--threads",
        min=1,
        max=MAX_THREADS,
        metavar="N",
        help="Threads that compute [default: the cores].",
    ),
]
ContextSize = Annotated[
    int | None,
    typer.Option(
        "-c",
        "--ctx",
        min=8,
        metavar="N",
        help="Tokens of context [default: what is needed and fits].",
    ),
]
GpuLayers = Annotated[
    int | None,
    typer.Option(
        "-g",
        "--gpu-layers",
        min=0,
        metavar="N",
        help="Layers on the GPU [default: all, where llama.cpp was built for one].",
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora", metavar="FILE[=SCALE]", help="LoRA adapter (GGUF) to add; may be repeated."
    ),
]
Rpc = Annotated[
    str | None,
    typer.Option(
        "--rpc",
        metavar="HOST:PORT[,...]",
        help="Compute layers on these workers (edgemerge rpc-worker): all, or as many as -g says.",
    ),
]
TrustNetwork = Annotated[
    bool,
    typer.Option(
        "--i-trust-this-network",
        help="Let rpc traffic leave this machine, where whoever is between can read and change it.",
    ),
]


def parse_rpc(text: str | None, trusted: bool) -> tuple[str, ...]:
    """Read `--rpc`; none without it.

    Raises
    ------
    RecipeError
        As of `read_addresses`.
    typer.BadParameter
        The network is trusted and not used (exit code 2).
    """
    from edgemerge.runtime.rpc.addresses import read_addresses

    if text is None:
        if trusted:
            raise typer.BadParameter("--i-trust-this-network goes with --rpc")
        return ()
    return read_addresses(text, is_trusted=trusted)


def parse_loras(texts: list[str] | None) -> tuple[Lora, ...]:
    """Read `FILE` and `FILE=SCALE`.

    Raises
    ------
    typer.BadParameter
        The scale is no number (exit code 2).
    """
    from edgemerge.runtime.llama import Lora

    loras = []
    for text in texts or []:
        path, equals, scale = text.rpartition("=")
        if not equals or Path(text).exists():
            loras.append(Lora(Path(text)))
            continue
        try:
            factor = float(scale)
        except ValueError:
            factor = math.nan
        if not math.isfinite(factor):
            raise typer.BadParameter(f"--lora {text!r}: the scale {scale!r} is no number")
        loras.append(Lora(Path(path), factor))
    return tuple(loras)


def load(
    path: Path,
    threads: int | None,
    gpu_layers: int | None,
    loras: list[str] | None = None,
    rpc: tuple[str, ...] = (),
) -> Model:
    """Load a model as the options say, heeding Ctrl-C; close it after use."""
    from edgemerge.runtime.llama import Model
    from edgemerge.runtime.model_files import open_gguf
    from edgemerge.runtime.worker import Worker

    adapters = parse_loras(loras)
    open_gguf(path).close()
    with Worker() as worker:
        return worker.do(
            Model, path, n_threads=threads, n_gpu_layers=gpu_layers, loras=adapters, rpc=rpc
        )


def open_answering(cluster: str, threads: int | None) -> AbstractContextManager[Connection]:
    """Connect to the cluster of `--cluster` that is to answer questions, or start one of this machine."""
    from edgemerge.cluster.connection import open_cluster
    from edgemerge.merging.run import usable_processors
    from edgemerge.planning.plan import DEFAULT_MEMORY

    return open_cluster(cluster, memory=DEFAULT_MEMORY, threads=threads or usable_processors())
