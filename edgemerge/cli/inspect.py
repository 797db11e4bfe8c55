"""`edgemerge inspect`: what a model file holds, and what a merge would make of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgemerge.cli import request
from edgemerge.cli.finding import Download, ModelsFolder, make_finder
from edgemerge.cli.terminal import plain, print_json, print_table, speaks_plainly
from edgemerge.remote.stand_ins import is_address
from edgemerge.shown_paths import shown_path
from edgemerge.types import Source

if TYPE_CHECKING:
    from edgemerge.formats.inspection import Inspection, Provenance
    from edgemerge.planning.losses import Verdict

__all__ = ["inspect_command"]

MAX_SHOWN = 60  # characters of a metadata value in the table


@speaks_plainly
def inspect_command(
    model: Annotated[
        str,
        typer.Argument(
            help="GGUF file, Hugging Face directory, org/name, or address (https://, hf://, s3://, sftp://); "
            "with a LoRA adapter, MODEL+ADAPTER."
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="BASE",
            help="Say what a merge onto this base would refuse, and what would be lost.",
        ),
    ] = None,
    template: Annotated[
        bool,
        typer.Option(
            "--template",
            help="Print the whole chat template, and nothing else; a file or pipe gets its very bytes.",
        ),
    ] = False,
    all_: Annotated[
        bool, typer.Option("--all", help="Also list every key of the metadata.")
    ] = False,
    models_folder: ModelsFolder = None,
    download: Download = False,
    json_: request.Json = False,
) -> None:
    """Show a model's architecture, types, tokenizer, provenance, and what a merge would lose."""
    from contextlib import ExitStack

    from edgemerge.formats import open_model
    from edgemerge.formats.inspection import inspect_model
    from edgemerge.planning.losses import judge_merge

    find = make_finder(models_folder, download, quiet=json_, streams=True).find_model
    with ExitStack() as stack:
        source = open_model(find(model))
        stack.callback(source.close)
        if template and not json_:
            _print_template(source)
            return
        verdict = None
        if against is not None:
            base = open_model(find(against))
            stack.callback(base.close)
            verdict = judge_merge(base, source)
        inspection = inspect_model(source)
        if json_:
            document = _as_json(source, inspection, with_templates=template)
            if verdict is not None:
                document["against"] = {"path": _shown(against, base), **asdict(verdict)}
            print_json(document)
        else:
            _print(source, inspection, with_metadata=all_)
            if verdict is not None:
                _print_verdict(verdict, plain(_shown(against, base)))


def _shown(given: str | None, opened: Source) -> str:
    """Return a path as it was given, an address without a login."""
    return shown_path(opened.path) if given is None or is_address(given) else given


def _as_json(source: Source, inspection: Inspection, *, with_templates: bool) -> dict[str, Any]:
    from edgemerge.formats.gguf.metadata import decode_value
    from edgemerge.formats.inspection import shorten
    from edgemerge.planning.losses import foresee_losses

    document: dict[str, Any] = shorten(asdict(inspection))
    document["bytes"] = document.pop("nbytes")
    document["types"] = [
        {
            "type": share.dtype,
            "tensors": share.tensors,
            "elements": share.elements,
            "bytes": share.nbytes,
            "share": share.elements / max(1, inspection.elements),
        }
        for share in inspection.types
    ]
    document["templates"] = [
        {"name": found.name, "length": len(found.text), "first_line": found.first_line}
        | ({"text": found.text} if with_templates else {})
        for found in inspection.templates
    ]
    document["losses"] = foresee_losses(source)
    document["metadata"] = shorten({k: decode_value(raw) for k, raw in source.metadata().items()})
    document["tensors"] = [
        {"name": s.name, "shape": list(s.shape), "type": s.dtype, "bytes": s.nbytes}
        for s in source.specs().values()
    ]
    return document


def _print_template(source: Source) -> None:
    from edgemerge.errors import FormatError
    from edgemerge.formats.inspection import inspect_model

    templates = inspect_model(source).templates
    if not templates:
        raise FormatError(
            "has no chat template; a recipe can give one (chat_template)", path=source.path
        )
    text = templates[0].text
    if sys.stdout is None or sys.stdout.isatty():
        print("\n".join(plain(line) for line in text.replace("\t", "    ").splitlines()))
    else:  # a file or a program gets what `--template FILE` may give back
        sys.stdout.buffer.write(text.encode())


def _print(source: Source, inspection: Inspection, *, with_metadata: bool) -> None:
    from edgemerge.formats.adapters.delta import DELTA
    from edgemerge.formats.gguf.metadata import get_value
    from edgemerge.formats.gguf.model import GgufModel
    from edgemerge.planning.losses import foresee_losses

    print(f"{plain(inspection.name)}  ({shown_path(source.path)})")
    is_delta = get_value(source.metadata(), "general.type") == DELTA
    for line in _delta_summary(source, inspection) if is_delta else _summary(inspection):
        print(f"  {plain(line)}")
    print()
    _print_types(inspection)
    metadata = source.metadata()
    if with_metadata:
        print()
        print_table(("key", "value"), [(key, _show(raw)) for key, raw in metadata.items()])
    else:
        print(f"{len(metadata)} keys of metadata: --all lists them")
    if not is_delta:
        _print_list("What a merge would lose", foresee_losses(source))
    if isinstance(source, GgufModel) and source.trailing_bytes:
        print(f"note: {source.trailing_bytes} bytes after the last tensor belong to nothing")


def _summary(found: Inspection) -> list[str]:
    from edgemerge.sizes import format_count, format_size

    file_type = f", {found.file_type}" if found.file_type else ""
    lines = [
        f"{found.architecture}, {format_count(found.elements)} parameters in {found.n_tensors} "
        f"tensors, {format_size(found.nbytes)}, {found.bits:.2f} bits per parameter{file_type}",
        f"layers {_range(found.layers)}, width {_range(found.width)}, "
        f"heads {_range(found.heads)} ({_range(found.kv_heads)} for keys and values) of "
        f"{_range(found.head_size)}, feed-forward {_range(found.feed_forward)}, "
        f"context {_range(found.context)}",
    ]
    if found.experts:
        lines.append(
            f"experts {_range(found.experts)}, of which a token uses {_range(found.experts_used)}: "
            f"{format_count(found.active_elements)} parameters are active"
        )
    if found.rope:
        lines.append("rope " + ", ".join(f"{key} {_range(v)}" for key, v in found.rope.items()))
    tied = ", embeddings tied" if found.is_tied else ""
    if found.tokenizer is None:
        lines.append(f"tokenizer none{tied}")
    else:
        pre = f" ({found.tokenizer.pre})" if found.tokenizer.pre is not None else ""
        lines.append(
            f"tokenizer {found.tokenizer.model}{pre}, {found.tokenizer.n_tokens} tokens{tied}"
        )
        special = [
            f"{token.role} {token.id}"
            + (f" {token.text}" if token.text is not None else " (unknown)")
            for token in found.tokenizer.special
        ]
        if special:
            lines.append("special tokens " + ", ".join(special))
    lines += [
        f"chat template{f' {template.name}' if template.name else ''}: {len(template.text)} "
        f"characters, {_cut(template.first_line)}"
        for template in found.templates
    ] or ["chat template none"]
    if found.provenance is not None:
        lines.append(_made_by(found.provenance))
    return lines


def _delta_summary(source: Source, found: Inspection) -> list[str]:
    from edgemerge.formats.adapters.delta import KEPT, tensor_name
    from edgemerge.formats.gguf.metadata import get_value
    from edgemerge.sizes import format_size

    metadata = source.metadata()
    base = get_value(metadata, "general.base_model.0.name", "?")
    changed = len({tensor_name(name) for name in source.specs()})
    kept = get_value(metadata, KEPT)
    part = f", {100 * kept:.4g} % of the change kept" if isinstance(kept, float) else ""
    lines = [
        f"delta of {base}, {found.architecture}, {changed} changed tensors, "
        f"{format_size(found.nbytes)}{part}",
        "in a merge it stands for its expert: give the base with --base, or BASE+DELTA",
    ]
    return lines if found.provenance is None else [*lines, _made_by(found.provenance)]


def _made_by(provenance: Provenance) -> str:
    inputs = ", ".join(f"{hub or name} ({crc})" for name, crc, hub in provenance.inputs_from())
    # The only input of a mixture has that name.
    made = inputs if provenance.method == "mixture" else f"{provenance.method} of {inputs}"
    return f"made by edgemerge {provenance.version}: {made}"


def _range(value: object) -> str:
    """Show a number, or for a list with an entry per layer its least and largest."""
    from edgemerge.formats.gguf.metadata import Array

    if isinstance(value, Array) and value:
        least, largest = min(value), max(value)
        return f"{least}" if least == largest else f"{least} to {largest} by layer"
    if isinstance(value, float):
        return f"{value:.7g}"  # all that a float32 holds
    return "?" if value is None else str(value)


def _print_types(inspection: Inspection) -> None:
    from edgemerge.sizes import format_size

    rows = [
        (
            share.dtype,
            str(share.tensors),
            f"{share.elements:,}",
            f"{100 * share.elements / max(1, inspection.elements):.1f} %",
            format_size(share.nbytes),
        )
        for share in inspection.types
    ]
    header = ("type", "tensors", "elements", "share", "size")
    print_table(header, rows, right="tensors elements share size")


def _print_list(title: str, sentences: Sequence[str]) -> None:
    if sentences:
        print(f"\n{title}:")
        for sentence in sentences:
            print(f"  - {plain(sentence)}")


def _print_verdict(verdict: Verdict, base: str) -> None:
    _print_list(f"A merge onto {base} would be refused", verdict.refused)
    _print_list(f"A merge onto {base} would lose", verdict.lost)
    if not verdict.refused and not verdict.lost:
        print(f"\nA merge onto {base} would lose nothing.")


def _show(raw: bytes) -> str:
    from edgemerge.formats.gguf.metadata import Array, decode_value

    value = decode_value(raw)
    if isinstance(value, Array):
        shown = ", ".join(str(item) for item in value[:4])
        return _cut(f"[{len(value)}] {shown}{', ...' if len(value) > 4 else ''}")
    return _cut(str(value))


def _cut(text: str) -> str:
    text = plain(text)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
