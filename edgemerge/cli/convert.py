"""`edgemerge convert`: a merge of one model."""

from __future__ import annotations

from typing import Annotated

import typer

from edgemerge.cli import request
from edgemerge.cli.terminal import plain, print_json, progress_bar, speaks_plainly

__all__ = ["convert_command"]


@speaks_plainly
def convert_command(
    model: Annotated[str, typer.Argument(help="GGUF file or Hugging Face directory.")],
    output: request.Output,
    out_type: request.Type = None,
    memory: request.Memory = None,
    threads: request.Threads = None,
    force: request.Force = False,
    json_: request.Json = False,
) -> None:
    """Convert one model: Hugging Face to GGUF, or GGUF to another type."""
    from edgemerge.merge import merge
    from edgemerge.recipe import make_recipe
    from edgemerge.sizes import parse_size

    recipe = make_recipe("passthrough", [(model, None)], out_type=out_type)
    with progress_bar(f"convert -> {output.name}", quiet=json_) as progress:
        result = merge(
            recipe,
            output,
            memory=parse_size(memory) if memory is not None else None,
            threads=threads,
            force=force,
            progress=progress,
        )
    if json_:
        print_json(result.as_json())
    else:
        print("\n".join(map(plain, result.lines())))
