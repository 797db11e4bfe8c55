"""`edgemerge record`: one page on a merged model for whoever has to answer for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgemerge.cli import request
from edgemerge.cli.made import describe_machine
from edgemerge.cli.terminal import print_json, progress_bar, speaks_plainly
from edgemerge.errors import VerificationError

if TYPE_CHECKING:
    from edgemerge.formats.inspection import Inspection, Provenance
    from edgemerge.provenance.signature import Signed
    from edgemerge.provenance.verification import Verification
    from edgemerge.reports.record import Section

__all__ = ["record_command"]

MAX_JSON = 256 << 20  # bytes of results; a question takes some 300
CARD_KEYS = ("license", "author", "organization", "base_model.0.name", "base_model.0.repo_url")


@speaks_plainly
def record_command(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="Merged GGUF, of a split any part; or merged directory."
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="RECORD.html", help="Page to write.")
    ],
    evaluation: Annotated[
        Path | None,
        typer.Option("--eval", metavar="RESULTS.json", help="What eval -o wrote."),
    ] = None,
    bench: Annotated[
        Path | None,
        typer.Option("--bench", metavar="BENCH.json", help="What bench --json printed."),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option("--key", metavar="PUB.pem", help="Also check the signature beside the model."),
    ] = None,
    force: request.Force = False,
    json_: request.Json = False,
) -> None:
    """Write a record: what a model is, of what and how it was made, what it scores and takes."""
    from edgemerge.formats.files import real_path
    from edgemerge.formats.gguf.split import sibling_parts
    from edgemerge.merging.run import usable_processors
    from edgemerge.output.file import check_output, write_file
    from edgemerge.provenance.verification import verify_model
    from edgemerge.reports.record import Record, record_page

    given = tuple(real_path(path) for path in (model, evaluation, bench, key) if path is not None)
    check_output(output, given, force=force)
    scores = None if evaluation is None else _read_json(evaluation, "results", "eval -o")
    speeds = None if bench is None else _read_json(bench, "models", "bench --json")
    files = sibling_parts(model)
    if model.is_dir():
        files = sorted(path for path in model.iterdir() if path.is_file())
    name = model.name if model.is_dir() else files[0].name
    signed = None if key is None else _check_signature(model, key, quiet=json_)
    with progress_bar(f"verify {model.name}", quiet=json_) as progress:
        found = verify_model(model, threads=usable_processors(), progress=progress)
    digests = _hash(files, quiet=json_)
    inspection = _inspect(model)
    sections = [
        _what(inspection, files, digests),
        _from_what(model, found.provenance),
        _how(found.provenance),
        _checks(found, signed),
    ]
    if scores is not None:
        sections.append(_scores(scores, set(digests)))
    if speeds is not None:
        sections.append(_speeds(speeds, name))
    sections.append(_when())
    record = Record(f"Record of {name}", tuple(sections))
    write_file(output, record_page(record).encode("utf-8", errors="backslashreplace"))
    if json_:
        print_json({"output": str(output), **record.as_json()})
    else:
        print(f"{output}  record of {name}")
    if isinstance(signed, VerificationError):  # raised here, as the page says it first
        raise signed
    found.check()


def _check_signature(model: Path, key: Path, *, quiet: bool) -> Signed | VerificationError:
    """Return what is known of the signature, or why it does not hold."""
    from edgemerge.provenance.keys import read_public_key
    from edgemerge.provenance.signature import check_signature

    public = read_public_key(key)
    try:
        with progress_bar(f"signature of {model.name}", quiet=quiet) as progress:
            return check_signature(model, public, progress=progress)
    except VerificationError as error:
        return error


def _read_json(path: Path, key: str, maker: str) -> Mapping[str, Any]:
    from edgemerge.errors import FormatError
    from edgemerge.formats.files import read_text

    try:
        document = json.loads(read_text(path, MAX_JSON))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"is not JSON; give what edgemerge {maker} wrote", path=path) from error
    if not isinstance(document, dict) or not isinstance(document.get(key), list):
        raise FormatError(f"is not what edgemerge {maker} writes; give that", path=path)
    return document


def _hash(files: Sequence[Path], *, quiet: bool) -> list[str]:
    from edgemerge.output.file import read_chunks

    total, done, digests = sum(path.stat().st_size for path in files), 0, []
    with progress_bar("sha256", quiet=quiet) as progress:
        for path in files:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                for chunk in read_chunks(file.fileno(), 0, path.stat().st_size):
                    digest.update(chunk)
                    done += len(chunk)
                    progress(done, total)
            digests.append(digest.hexdigest())
    return digests


def _inspect(model: Path) -> Inspection:
    from contextlib import closing

    from edgemerge.formats import open_model
    from edgemerge.formats.inspection import inspect_model

    with closing(open_model(model)) as source:
        return inspect_model(source)


def _what(inspection: Inspection, files: Sequence[Path], digests: Sequence[str]) -> Section:
    from edgemerge.reports.record import Section
    from edgemerge.sizes import format_count, format_size

    rows = [
        ("name", inspection.name),
        ("architecture", f"{inspection.architecture}, {inspection.layers} layers"),
        ("parameters", format_count(inspection.elements)),
        ("type", inspection.file_type or ", ".join(one.dtype for one in inspection.types)),
        ("size", format_size(sum(path.stat().st_size for path in files))),
    ]
    rows += [
        (f"sha256 of {path.name}", digest) for path, digest in zip(files, digests, strict=True)
    ]
    return Section("What it is", rows=rows)


def _from_what(model: Path, provenance: Provenance) -> Section:
    from contextlib import closing

    from edgemerge.formats import open_model
    from edgemerge.formats.gguf.metadata import get_value
    from edgemerge.reports.record import Section

    with closing(open_model(model)) as source:
        metadata = source.metadata()
        card = [(key, get_value(metadata, f"general.{key}")) for key in CARD_KEYS]
    base = _recipe(provenance).get("base")
    rows = [
        (f"{name} ({hub})" if hub else name, "base" if name == base else "model", crc32)
        for name, crc32, hub in provenance.inputs_from()
    ]
    rows += [(key, "stated", str(value)) for key, value in card if isinstance(value, str)]
    return Section(
        "What it was made of",
        (
            (
                "Checksums are CRC-32 of the tensors that were read, in the order of the output.",
                None,
            ),
        ),
        ("input", "as", "checksum"),
        rows,
    )


def _recipe(provenance: Provenance) -> dict[str, Any]:
    try:
        recipe = json.loads(provenance.recipe)
    except (ValueError, RecursionError):
        return {}
    return recipe if isinstance(recipe, dict) else {}


def _how(provenance: Provenance) -> Section:
    from edgemerge.recipe.words import describe_recipe, describe_stages
    from edgemerge.reports.record import Section

    how = describe_recipe(_recipe(provenance), provenance.transplant)
    lines = [*describe_stages(provenance.stages), *how]
    sentences = [(line, None) for line in lines]
    rows = [("made by", f"edgemerge {provenance.version}"), ("seed", str(provenance.seed))]
    return Section("How it was made", sentences, rows=[*rows, ("recipe", provenance.recipe)])


def _checks(found: Verification, signed: Signed | VerificationError | None) -> Section:
    from edgemerge.reports.record import Section

    said: list[tuple[str, bool | None]]
    if found.damaged:
        said = [
            (f"{len(found.damaged)} of {found.tensors} tensors changed since the merge.", False)
        ]
    else:
        said = [(f"All {found.tensors} tensors are as they were written.", True)]
    if found.trailing_bytes:
        more = f"{found.trailing_bytes} bytes after the last tensor were written by no merge."
        said.append((more, False))
    if signed is None:
        said.append(("No signature was checked: checksums find damage, not forgery.", None))
    elif isinstance(signed, VerificationError):
        said.append((f"The signature does not hold: {signed}.", False))
    else:
        said.append((f"Every byte is signed by the key {signed.key}.", True))
    return Section("Is it whole?", said)


def _scores(document: Mapping[str, Any], digests: set[str]) -> Section:
    from edgemerge.reports.record import Section

    known = {
        sha256
        for one in _tables(document, "models")
        for file in _tables(one, "files")
        if isinstance(sha256 := file.get("sha256"), str)
    }
    said: list[tuple[str, bool | None]]
    if not digests <= known:
        said = [("None of the models that were asked is this file, by its SHA-256.", False)]
    elif document.get("loras"):
        said = [("This file was asked with adapters, so the scores are not its own.", False)]
    else:
        said = [("This very file was asked, by its SHA-256.", True)]
    said.append(("Intervals are 95 %, from the standard error.", None))
    header = ("task", "model", "questions", "accuracy", "interval")
    return Section("What it scores", said, header, list(_score_rows(document)))


def _tables(table: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """Return the tables of a list; a file that was changed by hand may have anything there."""
    found = table.get(key)
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _number(table: Mapping[str, Any], key: str) -> float | None:
    found = table.get(key)
    try:
        return float(found) if isinstance(found, int | float) else None
    except OverflowError:  # JSON has whole numbers of any length
        return None


def _score_rows(document: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    from edgemerge.runtime.evaluation.intervals import Z_95

    for one in _tables(document, "results"):
        acc, error = _number(one, "acc"), _number(one, "acc_stderr")
        if acc is None:
            continue
        interval = ""
        if error is not None:
            low, high = (min(1.0, max(0.0, acc + sign * Z_95 * error)) for sign in (-1, 1))
            interval = f"{100 * low:.1f} to {100 * high:.1f} %"
        yield (
            str(one.get("task")),
            str(one.get("model")),
            str(one.get("n")),
            f"{100 * acc:.1f} %",
            interval,
        )


def _speeds(document: Mapping[str, Any], name: str) -> Section:
    from edgemerge.reports.record import Section
    from edgemerge.sizes import format_size

    rows = []
    for one in _tables(document, "models"):
        peak = _number(one, "peak_rss_bytes")
        memory = "" if peak is None else format_size(peak)
        for test in _tables(one, "tests"):
            speed = _number(test, "avg_ts")
            if speed is None:
                continue
            is_prompt = bool(test.get("n_prompt"))
            what = f"reads {test['n_prompt']}" if is_prompt else f"generates {test.get('n_gen')}"
            rows.append(
                (
                    str(one.get("model")),
                    f"{what} tokens, {test.get('n_threads')} threads",
                    f"{speed:.1f} tokens/s",
                    memory,
                    str(test.get("test_time", "")),
                )
            )
    said: list[tuple[str, bool | None]] = []
    if not any(Path(row[0]).name == name for row in rows):
        said = [(f"No model that was measured has the name {name}.", False)]
    return Section("What it takes", said, ("model", "test", "speed", "peak memory", "when"), rows)


def _when() -> Section:
    import platform
    from importlib.metadata import version

    from edgemerge.reports.record import Section

    rows = [
        ("written", datetime.now(UTC).isoformat(timespec="seconds")),
        ("by", f"edgemerge {version('edgemerge')}, Python {platform.python_version()}"),
        ("on", describe_machine()),
    ]
    return Section("When and where this record was written", rows=rows)
