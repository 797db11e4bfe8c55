"""Recipes of several documents: each stage becomes a file beside the output, which the next ones read.

The files lie in `OUT.gguf.stages/` and are removed when the output has its name. After an interrupt they
stay. The same call then takes over each finished stage, whose mark says which merge of which files it was.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from edgemerge.errors import OutputError
from edgemerge.formats import open_model
from edgemerge.formats.gguf.metadata import Array, encode_value, get_value
from edgemerge.merging.destination import list_parts
from edgemerge.output.file import part_path
from edgemerge.output.journal import Fingerprint
from edgemerge.output.report import MergeReport
from edgemerge.recipe.stages import place_stages, stage_paths
from edgemerge.sizes import format_size
from edgemerge.types import BeginPart, Plan, Progress, Recipe

__all__ = ["MergeOne", "merge_stages", "note_finished", "read_finished", "stage_folder"]
__all__ += ["stage_record"]

RECORD_KEYS = ("recipe", "inputs", "input_crc32")  # of `edgemerge.`, of each stage


class MergeOne(Protocol):
    """`edgemerge.merging.run.merge` for a recipe without stages."""

    def __call__(
        self,
        recipe: Recipe,
        output: Path,
        *,
        force: bool,
        progress: Progress | None,
        mark: Path | None = None,
        split_bytes: int | None = None,
        record: Mapping[str, bytes] | None = None,
    ) -> MergeReport:
        """Merge; see `merge_stages` for mark and record."""
        ...


def stage_folder(output: Path) -> Path:
    """Name the folder of an output's stages."""
    return output.with_name(output.name + ".stages")


def merge_stages(
    the_plan: Plan,
    output: Path,
    merge_one: MergeOne,
    *,
    disk: int | None,
    force: bool,
    split_bytes: int | None,
    progress: Progress | None,
    begin_part: BeginPart,
) -> MergeReport:
    """Merge all stages, then the output, and remove the stages.

    Parameters
    ----------
    the_plan : Plan
        Of a recipe with stages.
    output : Path
        The file to make.
    merge_one : callable
        Merges one recipe.
    disk : int, optional
        Bytes that the stages may take; else what is free.
    force, split_bytes, progress, begin_part
        As of `edgemerge.merging.run.merge`.

    Raises
    ------
    OutputError
        The stages need more than `disk`, or their folder cannot be made.
    EdgemergeError
        See `edgemerge.errors`; finished stages stay.
    """
    recipe, folder = the_plan.recipe, stage_folder(output)
    paths = stage_paths(recipe, folder)
    _make_folder(folder, paths.values())
    try:
        kept = _kept_bytes(paths.values(), list_parts(the_plan, output, split_bytes))
        _check_disk(the_plan, folder, kept, disk)
        reports = [
            merge_one(
                place_stages(stage, paths),
                path,
                force=True,  # the folder is ours
                progress=begin_part(f"stage {stage.name}"),
                mark=path.with_suffix(".mark"),
            )
            for stage, path in zip(recipe.stages, paths.values(), strict=True)
        ]
        report = merge_one(
            place_stages(recipe, paths),
            output,
            force=force,
            progress=progress,
            split_bytes=split_bytes,
            record=_record(recipe, paths),
        )
    except BaseException as error:
        if any(path.exists() for path in paths.values()):
            error.add_note(
                f"run the same command again to go on after the finished stages, or delete {folder}"
            )
        else:
            _remove(folder, paths.values())
        raise
    _remove(folder, paths.values())
    return _join(report, reports, recipe)


def _make_folder(folder: Path, paths: Collection[Path]) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"the folder cannot be made ({error.strerror})", path=folder) from error
    if folder.is_symlink():
        raise OutputError("is a link, and no folder of ours; remove it", path=folder)
    ours = {path.with_suffix(".mark").name for path in paths}
    ours |= {path.name + end for path in paths for end in ("", ".part", ".part.journal")}
    for name in os.listdir(folder):
        if name not in ours:
            raise OutputError(
                f"has a file {name!r} that is none of this merge's; remove the folder", path=folder
            )


def _kept_bytes(stages: Collection[Path], parts: Collection[Path]) -> int:
    """Count what an interrupted run left: finished stages, and parts with all blocks that they reserved."""
    sizes = (path.stat().st_size if path.exists() else 0 for path in stages)
    reserved = [_reserved_bytes(part_path(path)) for path in stages]
    stay = sum(map(max, sizes, reserved))  # a stage that is made again is not there twice
    return stay + sum(map(_reserved_bytes, parts))


def _reserved_bytes(part: Path) -> int:
    return 512 * part.stat().st_blocks if part.is_file() else 0


def _check_disk(the_plan: Plan, folder: Path, kept: int, disk: int | None) -> None:
    needed = sum(stage.written_bytes for stage in the_plan.stages)
    if disk is not None and needed > disk:
        raise OutputError(
            f"the stages need {format_size(needed)} of disk, more than the {format_size(disk)} that "
            "are allowed; allow more with --disk, or give stages out_dtype: float16",
            path=folder,
        )
    free = shutil.disk_usage(folder).free + kept
    needed += the_plan.written_bytes
    if needed > free:
        raise OutputError(
            f"the stages and the output need {format_size(needed)} of disk, and "
            f"{format_size(free)} are free; free some, or give stages out_dtype: float16",
            path=folder,
        )


def _record(recipe: Recipe, paths: Mapping[Path, Path]) -> dict[str, bytes]:
    """Say in the output what its stages were made of."""
    stages = []
    for stage, path in zip(recipe.stages, paths.values(), strict=True):
        with closing(open_model(path)) as source:
            stages.append(stage_record(str(stage.name), source.metadata()))
    return {"edgemerge.stages": encode_value(json.dumps(stages, sort_keys=True), "str")}


def stage_record(name: str, metadata: Mapping[str, bytes]) -> dict[str, object]:
    """Return what a merged file says of its making, as later files say it of a stage."""
    entry: dict[str, object] = {"name": name}
    for key in RECORD_KEYS:
        value = get_value(metadata, f"edgemerge.{key}")
        entry[key] = list(value) if isinstance(value, Array) else value
    if isinstance(hub := get_value(metadata, "edgemerge.input_hub"), Array):
        entry["input_hub"] = list(hub)
    return entry


def _remove(folder: Path, paths: Collection[Path]) -> None:
    """Remove the files of finished stages, and the folder where nothing else is in it."""
    for path in paths:
        path.unlink(missing_ok=True)
        path.with_suffix(".mark").unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _join(report: MergeReport, stages: Sequence[MergeReport], recipe: Recipe) -> MergeReport:
    """Add what the stages took to the report of the output."""
    notes = list(report.notes)
    for stage, made in zip(recipe.stages, stages, strict=True):
        size = format_size(made.out_bytes)
        notes.append(f"stage {stage.name}: {made.method}, {size} as {made.file_type}, removed")
        notes += [f"stage {stage.name}: {note}" for note in made.notes if note not in report.notes]
    return replace(
        report,
        seconds=report.seconds + sum(made.seconds for made in stages),
        read_bytes=report.read_bytes + sum(made.read_bytes for made in stages),
        written_bytes=report.written_bytes + sum(made.written_bytes for made in stages),
        notes=tuple(notes),
    )


# -- marks ---------------------------------------------------------------------------------------


def note_finished(mark: Path, output: Path, fingerprint: Fingerprint, sha256: str) -> None:
    """Note beside a finished stage what decided its bytes, and which file it is."""
    mark.write_text(f"{_identify(output, fingerprint)} {sha256}\n")


def read_finished(mark: Path, output: Path, fingerprint: Fingerprint) -> str | None:
    """Return the SHA-256 of a stage that an earlier run finished; None where it is to be made."""
    try:
        known, _, sha256 = mark.read_text().strip().rpartition(" ")
        return sha256 if known == _identify(output, fingerprint) else None
    except (OSError, UnicodeDecodeError):
        return None


def _identify(output: Path, fingerprint: Fingerprint) -> str:
    state = output.stat()
    file = f"{state.st_ino} {state.st_size} {state.st_mtime_ns}"
    return f"{fingerprint.work} {fingerprint.inputs} {file}"
