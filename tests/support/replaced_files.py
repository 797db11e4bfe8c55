"""Models whose files are replaced, for tests of reloads without a process."""

from __future__ import annotations

from dataclasses import replace

from edgemerge.errors import RuntimeFailure
from edgemerge.runtime.serve.loaded import Loaded
from edgemerge.runtime.serve.models import ModelFile, read_stamps
from edgemerge.runtime.serve.store import ModelStore
from tests.support.fake_process import Loader

__all__ = ["MIB", "ODD", "FullLoader", "end_process", "read_again", "write_new"]

MIB = 1 << 20
ODD = 20  # MiB of a model that has no answer


async def read_again(file: ModelFile) -> ModelFile:
    """Read what a model needs: a file that was replaced has its MiB in it."""
    text = file.path.read_text()
    base = int(text) * MIB if text else file.base
    return replace(file, base=base, stamps=read_stamps(file.path))


def write_new(store: ModelStore, name: str, mib: int) -> None:
    """Put another file in the place of a model's."""
    path = store.resolve(name).path
    other = path.with_suffix(".new")
    other.write_text(f"{mib}")
    other.replace(path)


def end_process(loader: Loader, store: ModelStore, name: str) -> None:
    for process in loader.started:
        if process.name == name:
            process.is_alive = False
    store.states()  # takes note of that


class FullLoader(Loader):
    """Has memory for one process of a name."""

    async def __call__(self, file: ModelFile) -> Loaded:
        if file.name in self.alive():
            raise RuntimeFailure(f"{file.path}: no memory is left")
        return await super().__call__(file)
