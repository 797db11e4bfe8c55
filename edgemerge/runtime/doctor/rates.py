"""How fast this machine merges: a few kernels, memory and storage, measured in five seconds and kept."""

from __future__ import annotations

import hashlib
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from statistics import geometric_mean

import numpy as np

from edgemerge.budget import Arena
from edgemerge.errors import OutputError
from edgemerge.formats.quants.codec import CODECS
from edgemerge.machine.caches import users_cache
from edgemerge.machine.control_group import usable_processors
from edgemerge.methods.blocks import ELECTION_TILE
from edgemerge.native import load_kernel
from edgemerge.native.store import compile_missing
from edgemerge.output.file import write_file
from edgemerge.planning.prediction import Rates
from edgemerge.planning.reference import IMPORTS, KERNELS, of_codec
from edgemerge.runtime.board.device import read_board, read_memory
from edgemerge.runtime.board.storage import measure_storage
from edgemerge.types import Float32

__all__ = ["kept_rates", "measure_rates"]

DECODED = ("BF16", "Q8_0", "Q4_K")
ENCODED = ("F16", "Q8_0", "Q4_K", "Q6_K")
KERNEL_NAMES = (
    *KERNELS,
    *(f"{CODECS[dtype].kernels}.decode_{dtype.lower()}" for dtype in DECODED),
    *(f"{CODECS[dtype].kernels}.encode_{dtype.lower()}" for dtype in ENCODED),
)
_SECONDS = 0.25  # for each kernel
_N = 1 << 20  # elements, as of a merge's blocks
_N_MODELS = 3
_COPIED = 32 << 20  # bytes by all threads together, more than a board's caches
_LEAST_COPIED = 4 << 20  # by one thread, more than the caches that it has to itself
_ERROR = (0.6, 1.6)
_NAME = "this machine"


def measure_rates(folder: Path) -> Rates:
    """Measure this machine and keep what was found; kernels that are missing are compiled before.

    Parameters
    ----------
    folder : Path
        Whose storage is measured.

    Raises
    ------
    RuntimeFailure
        The compiler failed.
    """
    compile_missing(KERNEL_NAMES)
    storage, copied = measure_storage(folder), _copy(usable_processors())
    in_memory = copied if storage.disk is not None and storage.disk.kind == "memory" else None
    rates = Rates(
        name=_NAME,
        cores=usable_processors(),
        memory=read_memory().available,
        decode=geometric_mean(_decode(dtype) for dtype in DECODED),
        encode=geometric_mean(_encode(dtype) for dtype in ENCODED),
        merge=geometric_mean(_merge(name) for name in KERNELS),
        python=_import() / IMPORTS,
        copied=copied,
        hashed=_hash(),
        read=storage.read_rate or in_memory,
        written=storage.write_rate or in_memory,
        error=_ERROR,
    )
    _keep(rates)
    return rates


def _best(work: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """Least seconds of a call, by default of CPU; the first, which may load or compile, does not count."""
    work()
    best, end = math.inf, time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        started = clock()
        work()
        best = min(best, clock() - started)
    return max(best, 1e-9)


def _values(n_rows: int) -> Float32:
    values = Arena(4 * n_rows * _N).take((n_rows, _N), np.float32).view(np.float32)
    values[:] = np.random.default_rng(0).standard_normal(values.shape, np.float32)
    return values


def _decode(dtype: str) -> float:
    """How many times the reference's seconds."""
    codec, values = CODECS[dtype], _values(1)[0]
    raw = np.zeros(_N // codec.block_len * codec.block_bytes, np.uint8)
    return _best(lambda: codec.decode(raw, values)) / (_N * 1e-9 * of_codec(dtype, writes=False))


def _encode(dtype: str) -> float:
    codec, values = CODECS[dtype], _values(1)[0]
    raw = np.zeros(_N // codec.block_len * codec.block_bytes, np.uint8)
    scratch = np.empty(codec.scratch_len, np.float32)
    seconds = _best(lambda: codec.encode(values, raw, scratch))
    return seconds / (_N * 1e-9 * of_codec(dtype, writes=True))


def _merge(name: str) -> float:
    kernel = load_kernel(*name.split("."))
    values, ones = _values(_N_MODELS), np.ones(_N_MODELS, np.float32)
    tiles, base = np.empty((3, ELECTION_TILE), np.float32), _values(1)[0]
    arguments = {
        "linear.weighted_sum": (ones, values),
        "ties.elect": (ones, ones, True, 0.0, tiles, values, base),
    }[name]
    values /= _N  # so that sums stay finite
    return _best(lambda: kernel(*arguments)) * KERNELS[name] * 1e6 / _N


def _import() -> float:
    """CPU seconds in which a new Python imports what merges."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-P", "-c", "import edgemerge.merging.run"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _copy(n_threads: int) -> float:
    """Bytes per second that so many threads copy together, each a part of its own."""
    n_bytes = max(_COPIED // n_threads, _LEAST_COPIED)
    parts = [(np.empty(n_bytes, np.uint8), np.ones(n_bytes, np.uint8)) for _ in range(n_threads)]
    with ThreadPoolExecutor(n_threads) as pool:
        seconds = _best(
            lambda: list(pool.map(lambda part: np.copyto(*part), parts)), time.perf_counter
        )
    return n_threads * n_bytes / seconds


def _hash() -> float:
    data = bytes(4 << 20)
    return len(data) / _best(lambda: hashlib.sha256(data).digest())


# -- what is kept ------------------------------------------------------------------------------------


def kept_rates() -> Rates | None:
    """Read what was measured on a machine of this name, or return None; its memory is what is free now."""
    try:
        entry = json.loads(_path().read_bytes())[_machine()]
        entry |= {"error": tuple(entry["error"]), "memory": read_memory().available}
        return Rates(**{field.name: entry[field.name] for field in fields(Rates)})
    except (OSError, OutputError, ValueError, RecursionError, KeyError, TypeError):
        return None  # missing, spoilt, or of another version: nobody has measured


def _keep(rates: Rates) -> None:
    """Keep rates; where the folder cannot be written, `plan` does not know them."""
    with suppress(OSError, OutputError):
        _path().parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({_machine(): asdict(rates)}, indent=1)
        write_file(_path(), f"{text}\n".encode())


def _machine() -> str:
    board = read_board()
    return f"{board.name or board.processor}, {usable_processors()} threads"


def _path() -> Path:
    return users_cache() / "rates.json"
