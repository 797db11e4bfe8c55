"""Examine the machine: what it is, how it does, and what that means for merging and running."""

from __future__ import annotations

import platform
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgemerge.errors import RuntimeFailure
from edgemerge.merging.precompile import find_missing_of_all
from edgemerge.runtime.board.device import (
    Board,
    Swap,
    Throttling,
    open_power_meter,
    read_board,
    read_swaps,
    read_temperature,
    read_throttling,
)
from edgemerge.runtime.board.storage import Storage, measure_storage
from edgemerge.runtime.doctor.advice import advise, merge_budget, warn_of_board, warn_of_llama
from edgemerge.runtime.doctor.build import LlamaBuild, read_build
from edgemerge.runtime.doctor.fit import Fit, ModelFit, fit_examples, fit_model
from edgemerge.runtime.llama import Model
from edgemerge.runtime.thread_counts import ThreadCounts, kept_counts

__all__ = ["Diagnosis", "Kernels", "Power", "examine"]

_TRIED = 32  # tokens of context with which threads are measured
_POWER_SECONDS = 0.15  # an x86 counter needs a span to tell power from


@dataclass(frozen=True, slots=True)
class Power:
    """Power now, and what it is the power of."""

    meter: str
    covers: str
    watts: float


@dataclass(frozen=True, slots=True)
class Kernels:
    """Merge kernels on disk.

    Attributes
    ----------
    numba : str
        Version of the compiler.
    total : int
        Methods, alignments, and types in both directions.
    cold : tuple of str
        Those that are not compiled yet: `method-ties`, `decode-Q4_K`.
    """

    numba: str
    total: int
    cold: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All that `edgemerge doctor` tells; None is what this machine does not tell.

    Attributes
    ----------
    versions : dict of str to str
        Python, edgemerge and what it stands on.
    llama : LlamaBuild or None
        None where llama.cpp cannot be used; `llama_problem` then says why and what to do.
    threads : ThreadCounts or None
        Threads that were measured with the model, or else with the last one that was loaded.
    merge_budget : int or None
        Bytes to give a merge.
    fits : tuple of Fit
        Which published models fit.
    model : ModelFit or None
        Whether the user's model fits.
    advice, warnings : tuple of str
        Sentences.
    """

    board: Board
    swaps: tuple[Swap, ...]
    storage: Storage
    temperature: float | None
    throttling: Throttling | None
    power: Power | None
    llama: LlamaBuild | None
    llama_problem: str | None
    kernels: Kernels
    versions: dict[str, str]
    threads: ThreadCounts | None
    merge_budget: int | None
    fits: tuple[Fit, ...]
    model: ModelFit | None
    advice: tuple[str, ...]
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Return plain types only."""
        document = asdict(self)
        document["storage"]["folder"] = str(self.storage.folder)
        if self.model is not None:
            document["model"]["path"] = str(self.model.path)
        if self.throttling is not None:
            document["throttling"]["active"] = self.throttling.active
        return document


def examine(folder: Path, model: Path | None = None, root: Path = Path("/")) -> Diagnosis:
    """Examine the machine; takes about a second, most of it to measure the storage.

    Parameters
    ----------
    folder : Path
        Where to measure the storage.
    model : Path, optional
        A model to judge, by its header.
    root : Path
        The file system that tells of the board.

    Raises
    ------
    FormatError
        The model is damaged, or none.
    """
    # sensors first: measuring the storage takes power and makes heat
    temperature, throttling, power = read_temperature(root), read_throttling(root), _power(root)
    board, swaps = read_board(root), read_swaps(root)
    available = board.memory.available
    model_fit = None if model is None else fit_model(model, available)
    storage = measure_storage(folder, root)
    fits = fit_examples(available)
    build: LlamaBuild | None = None
    problem = None
    try:
        build = read_build()
    except RuntimeFailure as error:
        problem = str(error)
    threads = None
    fits_now = model_fit is not None and model_fit.verdict == "fits"
    if build is not None and model_fit is not None and fits_now and model_fit.path.is_file():
        threads = _measure_threads(model_fit.path)
    elif kept := kept_counts():
        threads = list(kept.values())[-1]
    cold, total = find_missing_of_all()
    warnings = list(warn_of_board(board, swaps, storage, temperature, throttling))
    if build is not None:
        warnings += warn_of_llama(board, build)
    return Diagnosis(
        board=board,
        swaps=swaps,
        storage=storage,
        temperature=temperature,
        throttling=throttling,
        power=power,
        llama=build,
        llama_problem=problem,
        kernels=Kernels(version("numba"), total, tuple(cold)),
        versions=_versions(),
        threads=threads,
        merge_budget=merge_budget(board.memory),
        fits=fits,
        model=model_fit,
        advice=tuple(advise(board.memory, fits, threads)),
        warnings=tuple(warnings),
    )


def _measure_threads(path: Path) -> ThreadCounts:
    with Model(path) as model, model.context(_TRIED, n_batch=_TRIED):
        return model.threads


def _power(root: Path) -> Power | None:
    meter = open_power_meter(root)
    if meter is None:
        return None
    with meter:
        time.sleep(_POWER_SECONDS)
        return Power(meter.name, meter.covers, meter.watts())


def _versions() -> dict[str, str]:
    return {
        "edgemerge": version("edgemerge"),
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "system": f"{platform.system()} {platform.release()}",
    }
