"""An output that is a Hugging Face directory: shards, index, configuration, tokenizer and model card."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Lock

from edgemerge.formats.hub.claims import encode_claims
from edgemerge.formats.hub.files import CARD, INDEX
from edgemerge.formats.hub.layouts import Columns, Packed, Start
from edgemerge.formats.hub.placement import (
    SHARD_BYTES,
    Shard,
    find_places,
    index_file,
    list_units,
    make_shards,
)
from edgemerge.formats.layout import FileLayout
from edgemerge.merging.card import write_card
from edgemerge.merging.record import provenance
from edgemerge.output.checksums import TensorResult
from edgemerge.output.folder import OutputFolder, check_folder, staging_path
from edgemerge.output.journal import Fingerprint, journal_path
from edgemerge.output.parts import OutputParts, find_named
from edgemerge.output.places import Places, TensorPlace
from edgemerge.output.report import FileReport
from edgemerge.planning.folder import Folder
from edgemerge.planning.vocabulary import find_owner
from edgemerge.types import Plan, Source

__all__ = ["FolderDestination"]


class FolderDestination:
    """A directory; see `edgemerge.merging.destination.Destination`."""

    lists_files = True

    def __init__(
        self,
        the_plan: Plan,
        sources: Mapping[Path, Source],
        output: Path,
        split_bytes: int | None,
        *,
        force: bool,
    ) -> None:
        self.path = output
        self._plan, self._force = the_plan, force
        self._max_bytes = split_bytes or SHARD_BYTES
        specs = [job.out for job in the_plan.jobs]
        base, owner = sources[the_plan.models[0]], find_owner(the_plan.recipe, sources)
        folder = Folder(the_plan.recipe, base, owner)
        self._described = folder.describe(specs, the_plan.metadata, the_plan.file_type)
        self._units = list_units(self._described.config, specs)
        self._names = list(self._files([]))

    def _files(self, results: Sequence[TensorResult]) -> dict[str, FileLayout]:
        """Lay out all files: name -> layout, the first weights first."""
        metadata = {**self._plan.metadata, **provenance(self._plan, results)}
        shards = self._shards(metadata)
        index = index_file(shards, self._units)
        layouts = {name: shard.layout for name, shard in shards.items()}
        contents = {
            **({} if index is None else {INDEX: index}),
            **self._described.files,
            CARD: write_card(self._plan, metadata),
        }
        return layouts | {name: FileLayout(raw, {}, len(raw)) for name, raw in contents.items()}

    def _shards(self, metadata: Mapping[str, bytes]) -> dict[str, Shard]:
        claims = encode_claims(metadata, [job.out.name for job in self._plan.jobs])
        return make_shards(self._units, self._max_bytes, claims)

    def lay_out(self, results: Sequence[TensorResult]) -> list[FileLayout]:
        """Lay the files out."""
        return list(self._files(results).values())

    def paths(self) -> list[Path]:
        """Name the files in the folder where they are made."""
        return [staging_path(self.path) / name for name in self._names]

    def check(self) -> None:
        """Raise OutputError where the folder must not be written."""
        check_folder(self.path, self._plan.recipe.inputs(), force=self._force)

    def find_finished(self, fingerprint: Fingerprint) -> list[Path] | None:
        """Return the files where an interrupted run had finished them, and give the folder its name."""
        journal, finals = journal_path(self.path), [self.path / name for name in self._names]
        if len(find_named(finals, fingerprint, journal)) == len(finals):
            OutputFolder(self.path, self._names).remove_old()
            return finals
        self.check()
        if len(find_named(self.paths(), fingerprint, journal)) < len(finals):
            return None
        with OutputFolder(self.path, self._names) as folder:
            folder.publish()
        return finals

    def open(self, stack: ExitStack, fingerprint: Fingerprint) -> OutputParts:
        """Make the folder and its files."""
        self._folder = OutputFolder(self.path, self._names)
        stack.enter_context(self._folder)
        sizes = [layout.n_bytes for layout in self.lay_out([])]
        parts = OutputParts(list(zip(self.paths(), sizes, strict=True)), fingerprint, self.path)
        stack.push(parts)
        parts.open()
        return parts

    def places(self, parts: OutputParts) -> Places:
        """Say where each tensor is written to."""
        shards = self._shards({**self._plan.metadata, **provenance(self._plan, [])})
        files = {file.path: file for file in parts.files}
        by_path = {
            file.path: shards[file.path.name] for file in parts.files if file.path.name in shards
        }
        found = find_places(self._described.config, by_path)
        locks: defaultdict[Start, Lock] = defaultdict(Lock)
        places = {}
        for spec in (job.out for job in self._plan.jobs):
            layout = found[spec.name].layout
            assert not isinstance(layout, Packed)
            start, _ = next(layout.stored(spec, spec.n_rows))
            file = by_path[start[0]].layout
            is_mixed = isinstance(layout, Columns) and layout.is_mixed
            lock = locks[start] if is_mixed else nullcontext()
            span = (len(file.header), file.n_bytes)
            places[spec.name] = TensorPlace(files[start[0]], spec, layout, span, lock)
        return places

    def publish(self, parts: OutputParts) -> None:
        """Give the folder its name, unless one came under it that must not be replaced."""
        parts.publish(self.check, self._folder.publish)

    def final(self, file: FileReport) -> FileReport:
        """Return a report of a file under its final name."""
        return replace(file, path=self.path / file.path.name)
