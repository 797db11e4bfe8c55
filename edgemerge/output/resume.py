"""What an interrupted merge left, and what of it may be taken over.

The result of a merge follows from its `Origin`: a journal of the same origin speaks of tensors that would be
made again byte for byte. Whether they are in the part is not believed but read, tensor by tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TypeAlias

from edgemerge.formats.gguf.writer import GgufLayout
from edgemerge.formats.quants.imatrix import ImportanceMatrix
from edgemerge.output.checksums import TensorResult
from edgemerge.output.file import OutputFile
from edgemerge.output.journal import Entries, Origin, mark_file
from edgemerge.types import Plan, Progress, Source, TensorJob

__all__ = ["Places", "find_origin", "verify_earlier"]

Places: TypeAlias = Mapping[
    str, tuple[OutputFile, int]
]  # tensor -> its file, and where it begins there


def find_origin(
    the_plan: Plan,
    layouts: Sequence[GgufLayout],
    paths: Sequence[Path],
    sources: Sequence[Source],
    importance: ImportanceMatrix | None,
) -> Origin:
    """Hash all that decides the bytes of an output.

    Parameters
    ----------
    the_plan : Plan
        Of its parts that the budget decides, only the neurons that it allows to match count.
    layouts : sequence of GgufLayout
        Of the output's files, checksums zero: they hold the recipe, the metadata, shapes and types.
    paths : sequence of Path
        The output's files.
    sources : sequence of Source
        The open models.
    importance : ImportanceMatrix or None
        Open, where the recipe has one.
    """
    work = hashlib.blake2b(digest_size=16)
    work.update(f"{version('edgemerge')} {_hash_kernels()} {the_plan.align}\n".encode())
    if the_plan.recipe.neurons:  # layers too wide for the memory are left as they are
        work.update(f"{the_plan.neuron_bytes}\n".encode())
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
    if importance is not None:
        inputs.update(repr(mark_file(importance.state)).encode())
    return Origin(work.hexdigest(), inputs.hexdigest())


def _hash_kernels() -> str:
    """Hash the sources of the arithmetic: in a checkout they change without a new version."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted((Path(__file__).parents[1] / "kernels").glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def verify_earlier(
    earlier: Entries,
    jobs: Sequence[TensorJob],
    places: Places,
    on_sound: Callable[[int, TensorResult], None],
    progress: Progress | None = None,
) -> int:
    """Read back what an earlier run finished, and keep what is as its journal says.

    Parameters
    ----------
    earlier : Entries
        Of the same origin.
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
    _clear_gaps(jobs, places)
    return n_damaged


def _is_sound(job: TensorJob, places: Places, result: TensorResult) -> bool:
    file, offset = places[job.out.name]
    try:
        is_there = file.crc32(offset, job.out.nbytes) == result.output
        return is_there and len(result.inputs) == len(job.inputs)
    except OSError:  # what the medium cannot read may still be written again
        return False


def _clear_gaps(jobs: Sequence[TensorJob], places: Places) -> None:
    """Write zeros after every tensor again, up to the next: no checksum speaks of them."""
    ends: dict[OutputFile, int] = {}
    for job in reversed(jobs):
        file, offset = places[job.out.name]
        end = offset + job.out.nbytes
        file.write(bytes(ends.get(file, file.n_bytes) - end), end)
        ends[file] = offset
