"""The output folder: made beside its name, and renamed when all of its files are whole.

Files are made in `NAME.part/` (`edgemerge.output.parts`), and their journal lies beside it. A folder of that
name is replaced only where edgemerge made it and nobody put a file of his own into it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Collection
from pathlib import Path
from types import TracebackType

from edgemerge.errors import FormatError, OutputError
from edgemerge.formats.adapters.reference import expand_inputs
from edgemerge.formats.files import real_path
from edgemerge.formats.hub.files import FOLDER_FILES, SHARD, SINGLE, shard_name
from edgemerge.formats.hub.safetensors import read_metadata
from edgemerge.output.file import finishing, sync_folder

__all__ = ["OutputFolder", "check_folder", "staging_path"]

OURS = "edgemerge.version"  # stands in the header of the first file of weights


def staging_path(folder: Path) -> Path:
    """Name the folder in which an output folder is made."""
    return folder.with_name(folder.name + ".part")


def check_folder(path: Path, inputs: tuple[Path, ...], *, force: bool) -> None:
    """Refuse an output folder that cannot or must not be written, before any work.

    Raises
    ------
    OutputError
        It exists with files in it and `force` is not given, it has files that edgemerge did not write,
        it is no folder, one of the inputs or in one, or its parent is missing.
    """
    if not path.name or path.name == "..":
        raise OutputError("names no folder to make; give the name of a new one", path=path)
    place = real_path(path)
    for given in map(real_path, expand_inputs(inputs)):
        if place == given or given in place.parents:
            raise OutputError("is one of the inputs, or in it; choose another name", path=path)
        if place in given.parents:
            raise OutputError("has one of the inputs in it; choose another name", path=path)
    if not path.parent.is_dir():
        raise OutputError(f"the folder {path.parent} does not exist; make it first", path=path)
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        raise OutputError("is there already and no folder; choose another name", path=path)
    names = sorted(os.listdir(path))
    if not names:
        return
    if not force:
        raise OutputError("exists already; choose another name or give --force", path=path)
    others = [name for name in names if not _is_of_output(path / name)]
    if others or not _is_ours(path):
        what = f"it has {others[0]!r}" if others else "no edgemerge made its weights"
        raise OutputError(
            f"is not replaced, as {what}; remove the folder or choose another name", path=path
        )


def _is_of_output(path: Path) -> bool:
    """Tell whether a file, or a part, has a name that files of an output have."""
    name = path.name.removesuffix(".part")
    is_known = name in FOLDER_FILES or SHARD.fullmatch(name) is not None
    return is_known and path.is_file() and not path.is_symlink()


def _is_ours(path: Path) -> bool:
    counts = {int(match[2]) for name in os.listdir(path) if (match := SHARD.fullmatch(name))}
    first = [SINGLE, *(shard_name(1, count) for count in sorted(counts))]
    found = [path / name for name in first if (path / name).is_file()]
    try:
        return bool(found) and all(OURS in read_metadata(file) for file in found)
    except FormatError:
        return False


class OutputFolder:
    """`NAME.part/`, locked, which `publish` renames. Left without that, it is removed where it is empty.

    Parameters
    ----------
    path : Path
        The final name.
    names : collection of str
        The files that will be in it.
    """

    def __init__(self, path: Path, names: Collection[str]) -> None:
        self.path = path
        self.staging = staging_path(path)
        self._old = path.with_name(path.name + ".old.part")
        self._names = {*names, *(f"{name}.part" for name in names)}
        self._fd = -1
        self._is_published = False

    def open(self) -> None:
        """Make the folder, or take over what an interrupted run left. Call `__exit__` afterwards.

        Raises
        ------
        OutputError
            It cannot be made, another merge writes it, or it has files of somebody else.
        """
        while not self._is_locked():
            pass
        for file in self.staging.iterdir():
            if file.name in self._names:
                continue
            if not _is_of_output(file):
                raise OutputError(
                    f"{self.staging.name} beside it has {file.name!r}, which is none of a model's; "
                    "remove it",
                    path=self.path,
                )
            file.unlink()

    def _is_locked(self) -> bool:
        """Make and lock the folder. Return False where another merge has just renamed or removed it."""
        self._close()
        try:
            self.staging.mkdir(exist_ok=True)
            self._fd = os.open(self.staging, os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            there = os.stat(self.staging, follow_symlinks=False)
        except FileNotFoundError:
            return False
        except BlockingIOError as error:
            raise OutputError(
                "another merge is writing it; wait for that one", path=self.path
            ) from error
        except OSError as error:
            raise OutputError(f"cannot be written ({error.strerror})", path=self.path) from error
        return os.path.samestat(os.fstat(self._fd), there)

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def publish(self) -> None:
        """Give the folder its name, durably, instead of the folder that `check_folder` let pass.

        Between two renames neither has the name. An interrupted run is then finished by the next one.

        Raises
        ------
        OutputError
            The disk refused.
        """
        with finishing(self.path):
            sync_folder(self.staging)
            if self.path.is_dir() and any(self.path.iterdir()):
                self.remove_old()
                self.path.rename(self._old)
            self.staging.rename(self.path)
            self._is_published = True
            sync_folder(self.path.parent)
        self.remove_old()

    def remove_old(self) -> None:
        """Remove the folder that was replaced."""
        with finishing(self.path):
            if self._old.is_dir() and not self._old.is_symlink():
                for file in [file for file in self._old.iterdir() if _is_of_output(file)]:
                    file.unlink()
                self._old.rmdir()

    def __enter__(self) -> OutputFolder:
        try:
            self.open()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._fd >= 0 and not self._is_published:
            with contextlib.suppress(OSError):  # it is not empty
                self.staging.rmdir()
        self._close()
