"""`edgemerge doctor`: what the board is, what is wrong with it, what it can run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgemerge.cli import request
from edgemerge.cli.finding import Download, ModelsFolder, make_finder
from edgemerge.cli.terminal import check_stop, plain, print_json, print_table, speaks_plainly

if TYPE_CHECKING:
    from edgemerge.planning.prediction import Rates
    from edgemerge.runtime.board.storage import Storage
    from edgemerge.runtime.doctor.diagnosis import Diagnosis
    from edgemerge.runtime.doctor.fit import ModelFit
    from edgemerge.runtime.serve.models import ModelFile

__all__ = ["doctor_command"]

UNKNOWN = "not reported by this machine"


@speaks_plainly
def doctor_command(
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="MODEL", help="Also say whether this model fits."),
    ] = None,
    storage: Annotated[
        Path,
        typer.Option("--storage", metavar="DIR", help="Folder whose storage speed is measured."),
    ] = Path(),
    compile_: Annotated[
        bool,
        typer.Option("--compile", help="Compile all merge kernels now; minutes on a small board."),
    ] = False,
    bench: Annotated[
        bool,
        typer.Option(
            "--bench",
            help="Measure for five seconds how fast this machine merges; plan then predicts times.",
        ),
    ] = False,
    models_folder: ModelsFolder = None,
    download: Download = False,
    json_: request.Json = False,
) -> None:
    """Examine this machine: board, memory, storage, heat, llama.cpp; and what it can run."""
    from edgemerge.runtime.doctor.diagnosis import examine
    from edgemerge.runtime.serve.models import read_model_file, usable_memory

    if not storage.is_dir():
        raise typer.BadParameter(f"--storage {storage} is no folder")
    if compile_:
        _compile()
    rates = _measure(storage) if bench else None
    if model is not None:
        model = make_finder(models_folder, download, quiet=json_).find_model(str(model))
    diagnosis = examine(storage.absolute(), model)
    served = None
    if model is not None and model.is_file():
        served = read_model_file(model).within(usable_memory(0))
    if json_:
        document = diagnosis.as_json()
        document["serve"] = None if served is None else _serve_json(served)
        document["rates"] = None if rates is None else rates.as_json()
        print_json(document)
    else:
        _print(diagnosis, served)
        if rates is not None:
            print()
            _print_section("merging", _merging(rates))


def _compile() -> None:
    """Compile, and count the steps on stderr while it is a terminal."""
    import sys

    from edgemerge.merging.precompile import precompile_all

    shown = sys.stderr is not None and sys.stderr.isatty()

    def show(done: int, total: int) -> None:
        check_stop()
        if shown:
            end = "\n" if done == total else ""
            print(f"\rcompiling kernels: {done} of {total}", end=end, file=sys.stderr, flush=True)

    precompile_all(show)


def _measure(storage: Path) -> Rates:
    from edgemerge.runtime.doctor.rates import measure_rates

    return measure_rates(storage.absolute())


def _merging(rates: Rates) -> Iterator[tuple[str, str]]:
    from edgemerge.sizes import format_size

    times = (("decode", rates.decode), ("encode", rates.encode), ("merge", rates.merge))
    shown = ", ".join(f"{name} {factor:.1f}" for name, factor in times)
    yield "a core", f"{shown} times as long as a core of the reference (docs/boards.md)"
    yield "Python", f"{rates.python:.1f} times as long to start"
    yield "memory", f"{format_size(int(rates.copied))}/s copied by all cores together"
    yield "SHA-256", f"{format_size(int(rates.hashed))}/s"
    yield "kept", "edgemerge plan predicts times from this"


def _serve_json(served: ModelFile) -> dict[str, int]:
    return {
        "requests": served.n_sequences,
        "context": served.n_ctx,
        "tokens": served.n_cache,
        "bytes": served.need,
    }


def _print(found: Diagnosis, served: ModelFile | None) -> None:
    _print_section("board", _board(found))
    print()
    _print_section("system", _system(found))
    print()
    _print_section("software", _software(found))
    print()
    _print_fits(found)
    print()
    if found.model is not None:
        _print_section("model", _model(found.model, found.board.memory.available, served))
        print()
    _print_section("advice", (("-", sentence) for sentence in found.advice))
    if found.warnings:
        print()
        _print_section("warnings", (("!", sentence) for sentence in found.warnings))


def _print_section(title: str, rows: Iterator[tuple[str, str]]) -> None:
    """Print a title and indented rows, whose names are as wide as their widest."""
    lines = list(rows)
    width = max(len(name) for name, _ in lines)
    print(title)
    for name, value in lines:
        print(f"  {name.ljust(width)}  {plain(value)}")


def _board(found: Diagnosis) -> Iterator[tuple[str, str]]:
    from edgemerge.sizes import format_size

    board = found.board
    yield "name", (board.name or "not named") + (" (virtual machine)" if board.virtual else "")
    soc = f", {board.soc}" if board.soc else ""
    yield "processor", f"{board.processor}{soc}, {board.architecture}"
    clock = f", up to {board.max_frequency_hz / 1e9:.2f} GHz" if board.max_frequency_hz else ""
    cores = f"{board.cores} core{'s' * (board.cores > 1)}"
    threads = f" ({board.threads} threads)" if board.threads != board.cores else ""
    yield "cores", f"{cores}{threads}{clock}"
    yield "instructions", " ".join(board.cpu_features) or "none that llama.cpp has kernels for"
    yield "graphics", ", ".join(board.accelerators) or "none found"
    limited = " (limit of the control group)" if board.memory.limited else ""
    yield (
        "memory",
        f"{format_size(board.memory.total)}{limited}, {format_size(board.memory.available)} free",
    )


def _system(found: Diagnosis) -> Iterator[tuple[str, str]]:
    from edgemerge.sizes import format_size

    swaps = [f"{format_size(swap.size)} on {swap.kind} ({swap.path})" for swap in found.swaps]
    yield "swap", ", ".join(swaps) or "none"
    yield "storage", _storage(found.storage)
    hot = found.temperature
    yield "temperature", UNKNOWN if hot is None else f"{hot:.0f} °C"
    throttling = found.throttling
    if throttling is None:
        yield "throttling", UNKNOWN
    else:
        yield "throttling", ", ".join(throttling.reasons) or "none now"
        if throttling.since_boot:
            yield "since boot", ", ".join(throttling.since_boot)
    power = found.power
    yield (
        "power",
        UNKNOWN if power is None else f"{power.watts:.1f} W ({power.meter}: {power.covers})",
    )


def _storage(storage: Storage) -> str:
    from edgemerge.sizes import format_size

    disk = f", {storage.disk.kind}" if storage.disk else ""
    room = f", {format_size(storage.free)} free" if storage.free is not None else ""
    where = f"{storage.folder}{disk}{room}"
    if storage.read_rate is None or storage.write_rate is None:
        return f"{where}; not measured: {storage.problem}"
    return (
        f"{where}; reads {storage.read_rate / 1e6:,.0f} MB/s, "
        f"writes {storage.write_rate / 1e6:,.0f} MB/s"
    )


def _software(found: Diagnosis) -> Iterator[tuple[str, str]]:
    from edgemerge.sizes import format_size

    versions = found.versions
    yield (
        "edgemerge",
        f"{versions['edgemerge']} on Python {versions['python']}, NumPy {versions['numpy']}, "
        f"{versions['system']}",
    )
    cold, total = len(found.kernels.cold), found.kernels.total
    state = "all compiled" if not cold else f"{total - cold} of {total} compiled"
    later = "; the rest at their first use, or now with --compile" if cold else ""
    yield "kernels", f"Numba {found.kernels.numba}, {state}{later}"
    if found.llama is None:
        yield "llama.cpp", str(found.llama_problem)
        return
    yield "llama.cpp", f"llama-cpp-python {found.llama.version}"
    yield "built with", " ".join(found.llama.features)
    gpus = [
        f"{gpu.name} {gpu.description}, {format_size(gpu.free)} of {format_size(gpu.total)} free"
        for gpu in found.llama.accelerators
    ]
    idle = "none found" if found.llama.can_offload else "not supported by this build"
    yield "GPU", "; ".join(gpus) or idle
    yield "boards", "can work together (--rpc)" if found.llama.has_rpc else "no RPC in this build"


def _print_fits(found: Diagnosis) -> None:
    from edgemerge.runtime.doctor.fit import FILE_TYPES, PROCESS_BYTES, TABLE_CONTEXT
    from edgemerge.sizes import format_size

    print(f"memory that models take with {TABLE_CONTEXT} tokens of context")
    cells = {(fit.model, fit.file_type): fit for fit in found.fits}
    rows = []
    for name in dict.fromkeys(fit.model for fit in found.fits):
        row = [cells[name, file_type] for file_type in FILE_TYPES]
        rows.append([f"  {name}", *(f"{format_size(fit.bytes)} {fit.verdict}" for fit in row)])
    print_table(("  model", *FILE_TYPES), rows)
    process = format_size(PROCESS_BYTES)
    print(f"  = weights + KV cache + scratch + {process}; fits: into 90 % of what is free")


def _model(model: ModelFit, available: int, served: ModelFile | None) -> Iterator[tuple[str, str]]:
    from edgemerge.sizes import format_size

    yield "file", str(model.path)
    yield "weights", format_size(model.needs.weights)
    yield "KV cache", f"{format_size(model.needs.kv_token)} per token of context"
    free = format_size(available)
    if model.n_ctx == model.n_ctx_train:
        yield (
            "fits",
            f"with all {model.n_ctx} tokens of context: {format_size(model.bytes)} of {free}",
        )
    elif model.n_ctx:
        yield (
            "fits",
            f"with -c {model.n_ctx}, of the {model.n_ctx_train} tokens it was trained for: "
            f"{format_size(model.bytes)} of {free}",
        )
    elif model.verdict == "tight":
        yield "tight", f"even a short context fills the {free} that are free: stop other programs"
    else:
        yield (
            "too large",
            f"it takes {format_size(model.bytes)} and {free} are free: take a smaller type or model",
        )
    if served is not None and model.n_ctx:
        why = ", as many as fit" if served.is_short else ""
        yield (
            "serve",
            f"{served.n_sequences} requests at a time (--parallel), {served.n_ctx} tokens for one (--ctx), "
            f"{served.n_cache} for all{why}: {format_size(served.need)}",
        )
