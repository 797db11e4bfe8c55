"""Where a merge resumes: what an interrupted run left, and which of its tensors are taken over.

A `Fingerprint` is of all that decides the bytes of a merge. A journal of the same fingerprint lists tensors
that this merge would make again byte for byte. Each is read, and taken over where its checksum is right.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

from edgemerge.formats.hub.files import CONFIG
from edgemerge.formats.layout import FileLayout
from edgemerge.formats.quants.imatrix import ImportanceMatrix
from edgemerge.output.checksums import TensorResult
from edgemerge.output.file import OutputFile
from edgemerge.output.journal import Entries, Fingerprint, mark_file
from edgemerge.output.places import Places
from edgemerge.types import Plan, Progress, Source, TensorJob

__all__ = ["find_fingerprint", "hash_sources", "verify_earlier"]

PACKAGE = Path(__file__).parents[1]
# Wings whose code decides the bytes of tensors; the header is hashed itself.
DECIDING = ("alignment", "formats", "kernels", "merging", "methods", "output", "planning")


def find_fingerprint(
    the_plan: Plan,
    layouts: Sequence[FileLayout],
    paths: Sequence[Path],
    sources: Sequence[Source],
    matrices: Sequence[ImportanceMatrix],
) -> Fingerprint:
    """Hash all that decides the bytes of an output.

    Parameters
    ----------
    the_plan : Plan
        No part of it that the budget decides counts.
    layouts : sequence of FileLayout
        Of the output's files, checksums zero: they hold the recipe, the metadata, shapes and types.
    paths : sequence of Path
        The output's files.
    sources : sequence of Source
        The open models.
    matrices : sequence of ImportanceMatrix
        Open; those that the plan uses.
    """
    work = hashlib.blake2b(digest_size=16)
    work.update(f"{version('edgemerge')} {hash_sources(PACKAGE)} {the_plan.align}\n".encode())
    for path, layout in zip(paths, layouts, strict=True):
        work.update(f"{path.name!r} {layout.n_bytes} {len(layout.header)}\n".encode())
        work.update(layout.header)
    inputs = hashlib.blake2b(digest_size=16)
    for source in sources:
        inputs.update(repr([mark_file(state) for state in source.states()]).encode())
        inputs.update(repr(list(source.specs().values())).encode())
        for key, value in source.metadata().items():
            inputs.update(f"{key!r} {len(value)}\n".encode())
            inputs.update(value)
        for config in sorted({state.path.with_name(CONFIG) for state in source.states()}):
            if config.is_file():  # it has factors of rows and rotations that are no metadata
                inputs.update(config.read_bytes())
    for matrix in matrices:
        inputs.update(repr(mark_file(matrix.state)).encode())
    return Fingerprint(work.hexdigest(), inputs.hexdigest())


@cache
def hash_sources(package: Path) -> str:
    """Hash all code that decides a byte of an output: in a checkout it changes without a new version.

    Parameters
    ----------
    package : Path
        The folder of edgemerge, in a checkout or where a wheel was installed.
    """
    digest = hashlib.blake2b(digest_size=16)
    for wing in DECIDING:
        for path in sorted((package / wing).rglob("*.py")):
            digest.update(f"{path.relative_to(package)} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def verify_earlier(
    earlier: Entries,
    jobs: Sequence[TensorJob],
    places: Places,
    on_sound: Callable[[int, TensorResult], None],
    progress: Progress | None = None,
) -> int:
    """Read the tensors that an earlier run finished, and keep those whose checksums are right.

    Parameters
    ----------
    earlier : Entries
        Of the same fingerprint.
    jobs : sequence of TensorJob
        All of the output's.
    places : mapping
        Where their tensors are.
    on_sound : callable
        Called with the number of every tensor that is sound, and its result; may raise to stop.
    progress : callable, optional
        Called with bytes read back and bytes in all.

    Returns
    -------
    int
        How many tensors are not as the journal says.
    """
    n_damaged = done = 0
    sizes = {i: jobs[i].out.nbytes for i in earlier.results if i < len(jobs)}
    total = sum(sizes.values())
    for i, result in sorted(earlier.results.items()):
        if i in sizes and _is_sound(jobs[i], places, result):
            on_sound(i, result)
        else:
            n_damaged += 1
        done += sizes.get(i, 0)
        if progress is not None:
            progress(done, total)
    _clear_gaps(places)
    return n_damaged


def _is_sound(job: TensorJob, places: Places, result: TensorResult) -> bool:
    try:
        is_there = places[job.out.name].crc32() == result.output
        return is_there and len(result.inputs) == len(job.inputs)
    except OSError:  # a sector that cannot be read may still be written
        return False


def _clear_gaps(places: Places) -> None:
    """Write the zeros between tensors again, as no checksum covers them."""
    ends: dict[OutputFile, int] = {}
    spans = {(place.file, *place.span) for place in places.values()}
    for file, start, end in sorted(spans, key=lambda span: span[1], reverse=True):
        file.write(bytes(ends.get(file, file.n_bytes) - end), end)
        ends[file] = start
