"""`edgemerge inspect`: what a model file holds."""

from __future__ import annotations

import math
from collections import Counter
from typing import Annotated, Any

import typer

from edgemerge.cli import request
from edgemerge.cli.terminal import plain, print_json, print_table, speaks_plainly
from edgemerge.types import Source

__all__ = ["inspect_command"]

MAX_SHOWN = 60  # characters of a metadata value in the table


@speaks_plainly
def inspect_command(
    model: Annotated[str, typer.Argument(help="GGUF file or Hugging Face directory.")],
    json_: request.Json = False,
) -> None:
    """Show a model's architecture, heads, types, size, metadata and provenance."""
    from pathlib import Path

    from edgemerge.formats import open_model

    source = open_model(Path(model))
    try:
        if json_:
            print_json(_as_json(source))
        else:
            _print(source)
    finally:
        source.close()


def _as_json(source: Source) -> dict[str, Any]:
    from edgemerge.formats.metadata import decode_value

    specs = source.specs()
    return {
        "path": str(source.path),
        "architecture": source.architecture,
        "elements": sum(spec.n_elements for spec in specs.values()),
        "bytes": sum(spec.nbytes for spec in specs.values()),
        "metadata": {key: _shorten(decode_value(raw)) for key, raw in source.metadata().items()},
        "tensors": [
            {"name": s.name, "shape": list(s.shape), "type": s.dtype, "bytes": s.nbytes}
            for s in specs.values()
        ],
    }


def _shorten(value: Any) -> Any:
    """Give of a long array, such as a vocabulary, its length; JSON has no infinity or NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list) and len(value) > 64:
        return {"length": len(value), "first": [_shorten(item) for item in value[:4]]}
    if isinstance(value, list):
        return [_shorten(item) for item in value]
    return value


def _print(source: Source) -> None:
    from edgemerge.formats.gguf import GgufModel
    from edgemerge.formats.metadata import get_value
    from edgemerge.sizes import format_count, format_size

    specs, metadata = source.specs(), source.metadata()
    arch = source.architecture
    name = get_value(metadata, "general.name", source.path.name)
    elements = sum(spec.n_elements for spec in specs.values())
    size = sum(spec.nbytes for spec in specs.values())
    print(f"{plain(str(name))}  ({source.path})")
    print(
        f"  {arch}, {format_count(elements)} parameters in {len(specs)} tensors, "
        f"{format_size(size)}, {8 * size / max(1, elements):.2f} bits per parameter"
    )

    def number(key: str) -> Any:
        return get_value(metadata, f"{arch}.{key}", "?")

    print(
        f"  layers {number('block_count')}, width {number('embedding_length')}, "
        f"heads {number('attention.head_count')} "
        f"({number('attention.head_count_kv')} for keys and values), "
        f"feed-forward {number('feed_forward_length')}, context {number('context_length')}"
    )
    tied = "" if "output.weight" in specs else ", embeddings tied"
    print(f"  tokenizer {get_value(metadata, 'tokenizer.ggml.model', 'none')}{tied}\n")
    _print_types(source, elements)
    print()
    rows = [(key, _show(raw)) for key, raw in metadata.items()]
    print_table(("key", "value"), rows)
    if isinstance(source, GgufModel) and source.trailing_bytes:
        print(f"note: {source.trailing_bytes} bytes after the last tensor belong to nothing")


def _print_types(source: Source, elements: int) -> None:
    from edgemerge.sizes import format_size

    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    shares: Counter[str] = Counter()
    for spec in source.specs().values():
        counts[spec.dtype] += 1
        sizes[spec.dtype] += spec.nbytes
        shares[spec.dtype] += spec.n_elements
    rows = [
        (
            dtype,
            str(counts[dtype]),
            f"{100 * share / max(1, elements):.1f} %",
            format_size(sizes[dtype]),
        )
        for dtype, share in shares.most_common()
    ]
    print_table(("type", "tensors", "share", "size"), rows, right="tensors share size")


def _show(raw: bytes) -> str:
    from edgemerge.formats.metadata import decode_value

    value = decode_value(raw)
    if isinstance(value, list):
        shown = ", ".join(str(item) for item in value[:4])
        text = f"[{len(value)}] {shown}{', ...' if len(value) > 4 else ''}"
    else:
        text = str(value)
    text = plain(text)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
