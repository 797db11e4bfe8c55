"""Where an output goes: into a GGUF file, into those of a split, or into a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from edgemerge.errors import OutputError
from edgemerge.formats.gguf.split import MAX_PARTS, divide_tensors, part_paths
from edgemerge.formats.gguf.writer import make_layouts
from edgemerge.formats.layout import FileLayout
from edgemerge.merging.record import provenance
from edgemerge.output.checksums import TensorResult
from edgemerge.output.file import check_name, check_output, part_path
from edgemerge.output.journal import Fingerprint, journal_path
from edgemerge.output.parts import OutputParts, find_named, is_begun
from edgemerge.output.places import Places, place_in_order
from edgemerge.output.report import FileReport
from edgemerge.types import Plan, Recipe, Source

__all__ = ["Destination", "check_destination", "check_split", "find_destination", "list_parts"]
__all__ += ["split_paths"]


class Destination(Protocol):
    """The files of one output."""

    path: Path  # what to load: of a split, its first file
    lists_files: bool  # whether the report tells of each file

    def lay_out(self, results: Sequence[TensorResult]) -> list[FileLayout]:
        """Lay the files out; checksums are zero until there are results, which does not change a size."""

    def paths(self) -> list[Path]:
        """Name the files while they are made, in the order of their layouts."""

    def check(self) -> None:
        """Raise OutputError where they must not be written."""

    def find_finished(self, fingerprint: Fingerprint) -> list[Path] | None:
        """Return the files where an interrupted run had finished them; else check that they may be made."""

    def open(self, stack: ExitStack, fingerprint: Fingerprint) -> OutputParts:
        """Make the files; what is pushed on the stack removes or keeps them."""

    def places(self, parts: OutputParts) -> Places:
        """Say where each tensor is written to."""

    def publish(self, parts: OutputParts) -> None:
        """Give the output its name, unless something came under it that must not be replaced."""

    def final(self, file: FileReport) -> FileReport:
        """Return a report of a file under its final name."""


def check_destination(
    recipe: Recipe, output: Path, inputs: tuple[Path, ...], *, is_split: bool, force: bool
) -> None:
    """Refuse an output that cannot be written, before the models are opened.

    Parameters
    ----------
    recipe : Recipe
        Says whether it is a file or a folder.
    output : Path
        Its name.
    inputs : tuple of Path
        What must not be replaced.
    is_split : bool
        Whether several GGUF files are wanted, whose names follow from the plan.
    force : bool
        Replace what is there.

    Raises
    ------
    OutputError
        See `check_output` and `check_folder`.
    """
    if recipe.out_format == "hf":
        from edgemerge.output.folder import check_folder

        if output.name in ("", ".."):
            raise OutputError("is a folder already; give the name of one to make", path=output)
        check_folder(output, inputs, force=force or is_begun(output))
        return
    check_name(output)
    if not is_split:
        check_output(output, inputs, force=force or is_begun(output))


def split_paths(the_plan: Plan, output: Path, split_bytes: int) -> list[Path]:
    """Name the GGUF files of a split, which follow from the plan.

    Raises
    ------
    OutputError
        There would be too many.
    """
    count = len(divide_tensors([job.out for job in the_plan.jobs], split_bytes))
    if count > MAX_PARTS:
        raise OutputError(
            f"would be a split of {count} files; allow larger ones with --split-max-size",
            path=output,
        )
    return part_paths(output, count)


def check_split(the_plan: Plan, output: Path, split_bytes: int, *, force: bool) -> None:
    """Refuse a split whose files cannot be written, before what it is made of is merged.

    Raises
    ------
    OutputError
        See `check_output`.
    """
    paths = split_paths(the_plan, output, split_bytes)
    for path in paths:
        check_output(path, the_plan.recipe.inputs(), force=force or is_begun(paths[0]))


def list_parts(the_plan: Plan, output: Path, split_bytes: int | None) -> list[Path]:
    """Name the files that an interrupted run may have left of an output, whose room it has already."""
    if the_plan.recipe.out_format == "hf":
        from edgemerge.output.folder import staging_path

        return list(staging_path(output).glob("*"))
    paths = [output] if split_bytes is None else split_paths(the_plan, output, split_bytes)
    return [part_path(path) for path in paths]


def find_destination(
    the_plan: Plan,
    sources: Mapping[Path, Source],
    output: Path,
    split_bytes: int | None,
    *,
    force: bool,
) -> Destination:
    """Choose what a plan asks for.

    Parameters
    ----------
    the_plan : Plan
        With all metadata.
    sources : mapping of Path to Source
        The open models.
    output : Path
        The file or the folder to make.
    split_bytes : int, optional
        Most bytes of tensors in one file.
    force : bool
        Replace what is there.

    Raises
    ------
    EdgemergeError
        What is asked for cannot be had.
    """
    if the_plan.recipe.out_format == "hf":
        from edgemerge.merging.folder_destination import FolderDestination  # only these pay for it

        return FolderDestination(the_plan, sources, output, split_bytes, force=force)
    return _GgufDestination(the_plan, output, split_bytes, force=force)


class _GgufDestination:
    """A GGUF file, or those of a split."""

    def __init__(
        self, the_plan: Plan, output: Path, split_bytes: int | None, *, force: bool
    ) -> None:
        self._plan, self._split_bytes, self._force = the_plan, split_bytes, force
        self.lists_files = split_bytes is not None
        self._paths = (
            [output] if split_bytes is None else split_paths(the_plan, output, split_bytes)
        )
        self.path = self._paths[0]

    def lay_out(self, results: Sequence[TensorResult]) -> list[FileLayout]:
        metadata = {**self._plan.metadata, **provenance(self._plan, results)}
        return make_layouts(metadata, [job.out for job in self._plan.jobs], self._split_bytes)

    def paths(self) -> list[Path]:
        return self._paths

    def check(self) -> None:
        self._check(self._paths)

    def _check(self, paths: Sequence[Path]) -> None:
        for path in paths:
            check_output(path, self._plan.recipe.inputs(), force=self._force)

    def find_finished(self, fingerprint: Fingerprint) -> list[Path] | None:
        named = find_named(self._paths, fingerprint, journal_path(self.path))
        self._check([path for path in self._paths if path not in named])
        return self._paths if len(named) == len(self._paths) else None

    def open(self, stack: ExitStack, fingerprint: Fingerprint) -> OutputParts:
        sizes = [layout.n_bytes for layout in self.lay_out([])]
        parts = OutputParts(list(zip(self._paths, sizes, strict=True)), fingerprint)
        stack.push(parts)
        parts.open()
        return parts

    def places(self, parts: OutputParts) -> Places:
        specs = {job.out.name: job.out for job in self._plan.jobs}
        return {
            name: place_in_order(file, offset, specs[name])
            for file, layout in zip(parts.files, self.lay_out([]), strict=True)
            for name, offset in layout.offsets.items()
        }

    def publish(self, parts: OutputParts) -> None:
        parts.publish(self.check)

    def final(self, file: FileReport) -> FileReport:
        return file
