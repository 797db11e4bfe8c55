"""Options of all commands that run a model: threads, context, GPU, LoRA."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from edgemerge.runtime.llama import Lora, Model

__all__ = ["MAX_THREADS", "ContextSize", "GpuLayers", "Loras", "Threads", "load", "parse_loras"]

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
    path: Path, threads: int | None, gpu_layers: int | None, loras: list[str] | None = None
) -> Model:
    """Load a model as the options say, heeding Ctrl-C; close it after use."""
    from edgemerge.runtime.llama import Model
    from edgemerge.runtime.model_files import open_gguf
    from edgemerge.runtime.worker import Worker

    adapters = parse_loras(loras)
    open_gguf(path).close()
    with Worker() as worker:
        return worker.do(Model, path, n_threads=threads, n_gpu_layers=gpu_layers, loras=adapters)
