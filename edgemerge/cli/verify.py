"""`edgemerge verify`: whether a merged file is what was written, what made it, and who signed it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgemerge.cli import request
from edgemerge.cli.finding import Download, ModelsFolder, make_finder
from edgemerge.cli.terminal import plain, print_json, progress_bar, progress_bars, speaks_plainly
from edgemerge.errors import RecipeError
from edgemerge.remote.stand_ins import is_address
from edgemerge.shown_paths import shown_path

if TYPE_CHECKING:
    from edgemerge.formats.inspection import Provenance
    from edgemerge.provenance.signature import Signed
    from edgemerge.provenance.verification import Verification

__all__ = ["verify_command"]


@speaks_plainly
def verify_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Merged GGUF, of a split any part; or merged directory; or the address of one.",
        ),
    ],
    key: Annotated[
        Path | None,
        typer.Option(
            "--key", metavar="PUB.pem", help="Also check the signature beside it with this key."
        ),
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="MODEL",
            help="Also check that it was made of these, files or addresses; give all of its inputs, one "
            "--input each.",
        ),
    ] = None,
    threads: request.Threads = None,
    models_folder: ModelsFolder = None,
    download: Download = False,
    json_: request.Json = False,
) -> None:
    """Check a merged file against its own checksums, and say what made it."""
    from edgemerge.merging.run import merge, usable_processors
    from edgemerge.provenance.inputs import check_inputs
    from edgemerge.provenance.verification import has_provenance, verify_model

    finder = make_finder(models_folder, download, quiet=json_, streams=True)
    if key is not None and is_address(model):
        raise RecipeError(
            "--key checks a file on this machine; download the model and its signature"
        )
    path = finder.find_model(model) if is_address(model) else Path(model)
    given = [finder.find_model(text) for text in inputs or ()]
    signed = None if key is None else _check_signature(path, key, quiet=json_)
    # Every byte is then known to be right, whatever else cannot be told.
    if signed is not None and not given and not has_provenance(path):
        _print_signed(signed, as_json=json_)
        return
    with progress_bars(f"verify {path.name}", quiet=json_) as (progress, begin_part):
        found = verify_model(path, threads=threads or usable_processors(), progress=progress)
        if found.is_sound and given:
            reading = begin_part("reading the inputs")
            check_inputs(path, given, merge_one=merge, progress=reading)
    if json_:
        print_json(_as_json(found, signed, checked=bool(given)))
    elif found.is_sound:
        _print(found, signed, checked=bool(given), is_folder=path.is_dir())
    found.check()


def _check_signature(model: Path, key: Path, *, quiet: bool) -> Signed:
    from edgemerge.provenance.keys import read_public_key
    from edgemerge.provenance.signature import check_signature

    public = read_public_key(key)
    with progress_bar(f"signature of {model.name}", quiet=quiet) as progress:
        return check_signature(model, public, progress=progress)


def _as_json(found: Verification, signed: Signed | None, *, checked: bool) -> dict[str, Any]:
    from edgemerge.formats.inspection import shorten

    provenance = found.provenance
    return {
        "files": [shown_path(path) for path in found.files],
        "sound": found.is_sound,
        "tensors": found.tensors,
        "bytes": found.nbytes,
        "damaged": list(found.damaged),
        "trailing_bytes": found.trailing_bytes,
        "version": provenance.version,
        "method": provenance.method,
        "seed": shorten(provenance.seed),
        "inputs": [
            {"name": name, "crc32": crc32} | ({"hub": hub} if hub else {})
            for name, crc32, hub in provenance.inputs_from()
        ],
        "inputs_checked": checked and found.is_sound,
        "recipe": _read_recipe(provenance),
        "signature": None if signed is None else _signature_json(signed),
    }


def _signature_json(signed: Signed) -> dict[str, str]:
    return {"path": str(signed.path), "key": signed.key}


def _describe(provenance: Provenance) -> list[str]:
    """Say the recipe in words, or give its text where another program has changed it."""
    from edgemerge.recipe.words import describe_recipe, describe_stages

    stages = describe_stages(provenance.stages)
    recipe = _read_recipe(provenance)
    if isinstance(recipe, dict):
        return [*stages, *describe_recipe(recipe, provenance.transplant)]
    return [*stages, f"recipe {provenance.recipe}"]


def _read_recipe(provenance: Provenance) -> object:
    """Return the recipe as the JSON that it is, or its text where another program has changed it."""
    try:
        recipe: object = json.loads(provenance.recipe)
        json.dumps(recipe, allow_nan=False)
        return recipe
    except (ValueError, RecursionError):
        return provenance.recipe


def _print_signed(signed: Signed, *, as_json: bool) -> None:
    """Show what is known of a model that edgemerge did not merge."""
    if as_json:
        files = [str(file.path) for file in signed.files]
        print_json({"files": files, "sound": True, "signature": _signature_json(signed)})
        return
    print(f"{signed.files[0].path}: every byte is as it was signed by the key {signed.key}")
    print("  it has no provenance section, so nothing says what made it")


def _print(found: Verification, signed: Signed | None, *, checked: bool, is_folder: bool) -> None:
    from edgemerge.sizes import format_size

    provenance = found.provenance
    same = ", as the given model's" if checked else ""
    parts = f" in {len(found.files)} files" if len(found.files) > 1 else ""
    print(
        f"{shown_path(found.files[0])}{parts}: all {found.tensors} tensors are as they were written"
    )
    lines = [
        f"{format_size(found.nbytes)} of tensors, made by edgemerge {provenance.version}, "
        f"seed {provenance.seed}",
        *(
            f"input {name}, checksum {crc32}{same}{', of the hub: ' * bool(hub)}{hub}"
            for name, crc32, hub in provenance.inputs_from()
        ),
        *_describe(provenance),
    ]
    if signed is None:
        remedy = "" if is_folder else ": for that, sign it and give --key"
        lines.append(f"checksums find damage, not forgery{remedy}")
    else:
        lines.append(f"signed, every byte, by the key {signed.key} ({signed.path})")
    for line in lines:
        print(f"  {plain(line)}")
