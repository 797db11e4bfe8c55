"""Where the machine code of kernels lies, and the child process that compiles what is missing.

An image is looked for among those that a wheel brings (`prebuilt`, `processors`), then in the folders where
this machine keeps its own. What is found nowhere is compiled by `edgemerge.native.compiler` in a process of
its own: LLVM's and Numba's memory, well over 100 MB, are never those of a merge.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

from edgemerge.errors import OutputError, RuntimeFailure
from edgemerge.machine.caches import users_cache
from edgemerge.machine.control_group import memory_limits
from edgemerge.native.image import BadImage, Image
from edgemerge.native.names import KERNELS, image_name
from edgemerge.native.processors import fitting_variants, processor_features

__all__ = ["compile_here", "compile_missing", "find_missing", "load_image", "slow_first"]

log = logging.getLogger(__name__)

PREBUILT = Path(__file__).parent / "prebuilt"
SLOW = ("encode", "search", "write", "drop_by")  # how kernels begin that take long to compile

# Minor versions whose code passes tests/native and tests/kernels; pyproject.toml has the same bounds.
TESTED_NUMBA = ("0.68",)
_INSTALL = f"pip install 'numba>={TESTED_NUMBA[0]},<0.{int(TESTED_NUMBA[-1][2:]) + 1}'"

_in_memory: dict[str, Image] = {}  # compiled where no folder can be written


def load_image(file: str, name: str) -> Image:
    """Return a kernel's machine code, compiling it where it is found nowhere.

    Parameters
    ----------
    file, name : str
        As in `SIGNATURES`.

    Raises
    ------
    RuntimeFailure
        It could not be compiled.
    """
    image = _find(file, name)
    if image is None:
        compile_missing([f"{file}.{name}"])
        image = _find(file, name)
    if image is None:
        raise RuntimeFailure(f"the kernel {file}.{name} was compiled and is gone again")
    return image


def find_missing(names: Collection[str]) -> list[str]:
    """Of some kernels (FILE.KERNEL), list those that are not compiled."""
    return sorted(name for name in names if _find(*name.split(".")) is None)


def compile_missing(names: Collection[str]) -> None:
    """Compile those of some kernels (FILE.KERNEL) that are not yet; does nothing where all are.

    Raises
    ------
    RuntimeFailure
        The compiler or its self-test failed, or this Numba is not one that was tested.
    """
    missing = find_missing(names)
    if not missing:
        return
    folder = _writable_folder()
    if folder is not None:
        _run_compiler(folder, missing)
        return
    with tempfile.TemporaryDirectory(prefix="edgemerge-") as temporary:
        _run_compiler(Path(temporary), missing)
        for path in Path(temporary).glob("*.image"):
            _in_memory[path.name] = Image.from_bytes(path.read_bytes())


def compile_here(names: Sequence[str]) -> None:
    """Compile kernels (FILE.KERNEL) in this process, for where none can be started: an emulator, a build.

    Raises
    ------
    RuntimeFailure
        No folder can be written, or this Numba is not one that was tested.
    """
    from edgemerge.native.compiler import main

    _check_version()
    folder = _writable_folder()
    if folder is None:
        raise RuntimeFailure("no folder for compiled kernels can be written; set NUMBA_CACHE_DIR")
    main(folder, list(names))


def _run_compiler(folder: Path, names: list[str]) -> None:
    """Let children compile: two at once, where there are processors and memory for both."""
    _check_version()
    log.info("compiling %d kernels, once", len(names))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = min([memory, *(limit for _, limit in memory_limits())])
    n_children = 2 if len(names) > 3 and (os.cpu_count() or 1) > 1 and memory >= 1 << 30 else 1
    by_cost = slow_first(names)
    children: list[subprocess.Popen[str]] = []
    # Numba's own cache does not see that a function was changed which another file uses.
    scratch = tempfile.TemporaryDirectory(prefix="edgemerge-", ignore_cleanup_errors=True)
    try:
        for i in range(n_children):
            children.append(_start_compiler(folder, by_cost[i::n_children], scratch.name))
        for child in children:
            _, errors = child.communicate()
            if child.returncode:
                raise _failure(child.returncode, errors, folder)
    except OSError as error:
        raise RuntimeFailure(
            f"the compiler of kernels could not be started ({error.strerror})"
        ) from error
    finally:
        for child in children:  # where one failed, or the user interrupted
            child.kill()
            child.wait()
        scratch.cleanup()


def _failure(status: int, errors: str, folder: Path) -> RuntimeFailure:
    """Say why a child failed, by its exit status and what it wrote, and what to do."""
    if status == -signal.SIGKILL:
        return RuntimeFailure(
            "the kernels could not be compiled, as their compiler was killed, which the system does where "
            "memory ends; stop other programs and try again"
        )
    reason = (errors.strip().splitlines() or [f"signal {-status}"])[-1]
    if os.strerror(errno.ENOSPC) in reason:
        return RuntimeFailure(
            f"the kernels could not be compiled, as {folder} or {tempfile.gettempdir()} is full; make room "
            "there, or set NUMBA_CACHE_DIR and TMPDIR"
        )
    return RuntimeFailure(
        f"the kernels could not be compiled with numba {version('numba')} ({reason}); "
        f"install one of the versions that are tested: {_INSTALL}"
    )


def _check_version() -> None:
    """Refuse a Numba whose calling convention nobody has looked at; its self-test comes after."""
    found = version("numba")
    if ".".join(found.split(".")[:2]) not in TESTED_NUMBA:
        raise RuntimeFailure(
            f"numba {found} was not tested with edgemerge, which is tested with "
            f"{', '.join(TESTED_NUMBA)}: {_INSTALL}"
        )


def slow_first(names: Collection[str]) -> list[str]:
    """Order kernels (FILE.KERNEL) so that compilers that share them end at about the same time."""
    return sorted(names, key=lambda name: not name.partition(".")[2].startswith(SLOW))


def _start_compiler(folder: Path, names: list[str], scratch: str) -> subprocess.Popen[str]:
    """Start a child. With -P nothing in the user's folder is taken for a module."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "edgemerge.native.compiler", str(folder), *names],
        env={**os.environ, "NUMBA_CACHE_DIR": scratch},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


# -- where images lie ------------------------------------------------------------------------------------


def _find(file: str, name: str) -> Image | None:
    wanted = image_name(file, name)
    if wanted in _in_memory:
        return _in_memory[wanted]
    for folder in (*_prebuilt_folders(), *_own_folders()):
        with suppress(OSError, BadImage):
            return Image.from_bytes((folder / wanted).read_bytes())
    return None


def _prebuilt_folders() -> Iterator[Path]:
    machine = platform.machine()
    for variant in fitting_variants(machine, processor_features()):
        yield PREBUILT / machine / variant.name


def _own_folders() -> list[Path]:
    """Folders of this machine's images: as set, else beside the kernels; then the user's.

    The user's stays out of sight where the one that is set can be written, so that it can be a fresh one.
    """
    name = f"native-{_toolchain()}"
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    folders = [Path(chosen or KERNELS / "__pycache__") / name]
    if not (chosen and _can_be_written(folders[0])):
        with suppress(OutputError, OSError):  # nobody's home, and no temporary folder
            folders.append(users_cache() / name)
    return folders


def _can_be_written(folder: Path) -> bool:
    """Tell whether a folder, or the first above it that exists, is one that this user may write."""
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    return os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK)


def _writable_folder() -> Path | None:
    for folder in _own_folders():
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    return None


@cache
def _toolchain() -> str:
    """Hash what else decides the machine code: compiler and processor."""
    parts = [platform.machine(), version("numba"), version("llvmlite")]
    parts += [os.environ.get(f"NUMBA_CPU_{part}", "") for part in ("NAME", "FEATURES")]
    parts += sorted(processor_features())
    return hashlib.blake2b(" ".join(parts).encode(), digest_size=8).hexdigest()
