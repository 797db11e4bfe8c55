"""Compiling kernels in a process of their own, once, so that the compiler's memory is never a merge's.

LLVM needs about 100 MB more than the code it makes, and the code is cached on disk: a merge that finds
its kernels compiled keeps a smaller budget than one that compiles. So before Numba is imported, `warm_up`
looks for a stamp beside Numba's cache for everything the plan will use; where one is missing, a child
process (`edgemerge.warm_child`) merges a tiny model by the same method, which compiles what is needed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

from edgemerge.formats.codec import CODECS
from edgemerge.formats.weighted import WEIGHTED_TYPES
from edgemerge.methods import METHODS
from edgemerge.types import Plan

__all__ = ["find_cold_of_all", "warm_all", "warm_kernels", "warm_up"]

log = logging.getLogger(__name__)

CHILD = "EDGEMERGE_WARMING"  # set in the child, which must not ask for a child itself


def warm_up(the_plan: Plan) -> None:
    """Make sure that the kernels of a plan are compiled; does nothing where they are.

    A child that fails is no error: the merge then compiles in its own process.
    """
    jobs = [job for job in the_plan.jobs if not job.is_byte_copy]
    if jobs:
        warm_kernels(
            the_plan.recipe.method,
            the_plan.align,
            read={tensor.spec.dtype for job in jobs for tensor in job.inputs},
            written={job.out.dtype for job in jobs if not job.is_weighted},
            weighed={job.out.dtype for job in jobs if job.is_weighted},
            neurons=the_plan.recipe.neurons,
        )


def warm_kernels(
    method: str,
    align: str,
    *,
    read: Collection[str],
    written: Collection[str],
    weighed: Collection[str] = (),
    neurons: bool = False,
) -> None:
    """Make sure that the kernels of a method and of some types are compiled.

    Parameters
    ----------
    method, align : str
        As in a `Plan`.
    read, written, weighed : collection of str
        ggml types that are decoded, encoded, and encoded by an importance matrix.
    neurons : bool
        Whether feed-forward neurons are matched.
    """
    if os.environ.get(CHILD):
        return
    request = [method, align, "on" if neurons else "off"]
    request += [",".join(sorted(dtypes)) for dtypes in (read, written, weighed)]
    needs = _needs(method, align, read, written, weighed, neurons=neurons)
    with suppress(OSError):
        cold = [need for need in needs if not _stamp(need).exists()]
        if cold and _run_child(request):
            for stamp in map(_stamp, cold):
                stamp.parent.mkdir(parents=True, exist_ok=True)
                stamp.touch()


def _needs(
    method: str,
    align: str,
    read: Collection[str],
    written: Collection[str],
    weighed: Collection[str],
    *,
    neurons: bool = False,
) -> list[str]:
    """Name what is compiled: `method-ties`, `decode-F16`; parameters as for `warm_kernels`."""
    needs = [f"method-{method}", f"align-{align}", *(["neurons-on"] if neurons else [])]
    needs += [f"decode-{dtype}" for dtype in sorted(read)]
    needs += [f"encode-{dtype}" for dtype in sorted(written)]
    return needs + [f"weigh-{dtype}" for dtype in sorted(weighed)]


def warm_all(on_step: Callable[[int, int], None]) -> None:
    """Compile every method, and every type in both directions; `on_step` is told the steps done, of all."""
    requests = _requests_of_all()
    for done, (method, align, read, written, weighed) in enumerate(requests):
        on_step(done, len(requests))
        warm_kernels(method, align, read=read, written=written, weighed=weighed)
    on_step(len(requests), len(requests))


def find_cold_of_all() -> tuple[list[str], int]:
    """Name what `warm_all` would compile, and count what it sees to in all."""
    total = {need for request in _requests_of_all() for need in _needs(*request)}
    return sorted(need for need in total if not _stamp(need).exists()), len(total)


def _requests_of_all() -> list[tuple[str, str, Collection[str], Collection[str], Collection[str]]]:
    """List what to ask `warm_kernels` for, so that every kernel but those of neurons is compiled."""
    written = {name for name, codec in CODECS.items() if codec.can_encode}
    return [
        ("linear", "hard", set(CODECS), written, WEIGHTED_TYPES),
        *((method, "off", {"F32"}, {"F32"}, ()) for method in METHODS),
    ]


def _run_child(request: list[str]) -> bool:
    """Let a child compile; whether it did. With -P nothing in the user's folder is taken for a module."""
    log.info("compiling kernels, once")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "edgemerge.warm_child", *request],
        env={**os.environ, CHILD: "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


def _stamp(need: str) -> Path:
    """Where the proof lies that something was compiled: beside the code, and gone with it."""
    return _cache_folder() / f"edgemerge-{_fingerprint()}-{need}.warm"


def _cache_folder() -> Path:
    """Folder of Numba's cache: as set, else beside the kernels, else the user's."""
    if chosen := os.environ.get("NUMBA_CACHE_DIR"):
        return Path(chosen)
    beside = _kernels() / "__pycache__"
    if os.access(beside if beside.exists() else beside.parent, os.W_OK):
        return beside
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgemerge"


def _kernels() -> Path:
    return (Path(__file__).parent / "kernels").resolve()


@cache
def _fingerprint() -> str:
    """Hash what Numba's cache depends on: the kernels and their place, compiler, Python, processor."""
    digest = hashlib.blake2b(digest_size=8)
    for path in [*sorted(_kernels().glob("*.py")), Path(__file__).with_name("warm_child.py")]:
        digest.update(path.read_bytes())
    digest.update(f"{_kernels()} {version('numba')} {version('llvmlite')} {sys.version}".encode())
    digest.update(_processor_features())
    return digest.hexdigest()


def _processor_features() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return b""
    return next((line for line in lines if line.lower().startswith((b"flags", b"features"))), b"")
