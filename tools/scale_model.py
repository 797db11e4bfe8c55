"""What two large jobs would cost: a merge on many nodes, and a registry that many sites send to each night.

    python -m tools.scale_model                         the tables of docs/scale.md
    python -m tools.scale_model --node-link 1250        with 10 Gb/s to each node
    python -m tools.scale_model --cores 64 --disk 3000  on other machines

CPU time and memory per parameter and per expert are those of docs/benchmarks.md, where straight lines hold
within a few per cent. Rates of links and disks are arguments: nothing here has measured them. Megabytes are
10^6 bytes.

A merge is a pipeline, whose slowest part sets the time; what one process does alone comes after it:

    seconds = max(read + write over each link and disk, CPU / (nodes * cores)) + output / hash rate
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
BENCHMARKS, SCALE = DOCS / "benchmarks.md", DOCS / "scale.md"
EXPERT_SIZE = 0.16  # billion parameters of each expert in that page's table
FIRST_EXPERTS = 2  # in the line against parameters
MEASURED_WORKERS = 2  # where experts vary there
RANK = 16  # of adapters
BITS = {"Q4_K_M": 4.85, "BF16": 16.0}  # per weight, of a whole file


@dataclass(frozen=True)
class Rates:
    """What machines and their links do: megabytes per second, unless a name says otherwise.

    Attributes
    ----------
    node_link : float
        Of each node; 1 Gb/s is 125.
    server_link, disk : float
        Of the file server or the registry.
    hash : float
        SHA-256 on one core; a copy is checked, and the output at the end of a merge.
    cores : int
        Of each node, and of the registry.
    uplink : float
        Of the registry, to the sites.
    night : float
        Hours in which all sites have to be done.
    storage : float
        Terabytes of the registry's disk.
    node_memory : float
        GB that a node has for a merge.
    """

    node_link: float = 125.0
    server_link: float = 1250.0
    disk: float = 2000.0
    hash: float = 1500.0
    cores: int = 4
    uplink: float = 125.0
    night: float = 8.0
    storage: float = 20.0
    node_memory: float = 8.0


@dataclass(frozen=True)
class Method:
    """What a merge by task arithmetic takes, in lines.

    Attributes
    ----------
    start : float
        CPU seconds of a process, whatever it merges.
    slope : float
        CPU seconds per billion parameters, of a base and two experts.
    expert : float
        CPU seconds per billion parameters of one more expert.
    memory, memory_worker, memory_expert : float
        MiB of a process, of each worker, and of each worker for each expert.
    """

    start: float
    slope: float
    expert: float
    memory: float
    memory_worker: float
    memory_expert: float

    def cpu(self, billions: float, n_experts: int, n_processes: int = 1) -> float:
        """CPU seconds of a merge over all processes."""
        per_billion = self.slope + (n_experts - FIRST_EXPERTS) * self.expert
        return n_processes * self.start + billions * per_billion

    def peak(self, n_experts: int, n_workers: int) -> float:
        """MiB of a process; each worker has blocks of all models."""
        return self.memory + n_workers * (self.memory_worker + n_experts * self.memory_expert)


@dataclass(frozen=True)
class Merge:
    """A merge of whole models on nodes that read and write one file server."""

    name: str
    billions: float
    n_experts: int
    n_nodes: int
    type_in: str
    largest: float  # billion parameters of the largest tensor
    passes: int = 1

    @property
    def bytes_in(self) -> float:
        """Megabytes that all nodes read: base and experts, once for each pass."""
        return self.passes * (self.n_experts + 1) * size(self.billions, self.type_in)

    @property
    def bytes_out(self) -> float:
        """Megabytes of the output, Q4_K_M."""
        return size(self.billions, "Q4_K_M")


@dataclass(frozen=True)
class Registry:
    """A place that sites send a delta to each night, and that merges them all."""

    name: str
    n_sites: int
    delta: float  # MB
    billions: float
    widest: int | None = None  # columns of the widest matrix of an adapter; None for whole models


def size(billions: float, file_type: str) -> float:
    """Megabytes of so many parameters."""
    return billions * 1e3 * BITS[file_type] / 8


def lora_size(rank: int, shapes: Sequence[tuple[int, int]], n_layers: int) -> float:
    """Megabytes of an adapter in halves: (m + n) * rank values for each matrix of m times n."""
    return 2e-6 * n_layers * rank * sum(m + n for m, n in shapes)


# -- what benchmarks have measured -------------------------------------------------------------------


def read_method(page: str) -> Method:
    """Read the lines of docs/benchmarks.md, and fit peaks against experts and threads."""
    start, slope = _line(page, "parameters", "per billion parameters")
    _, expert = _line(page, "experts", "per expert of 160M")
    _, by_expert = fit(_peaks(page, "experts"))
    by_expert /= MEASURED_WORKERS
    memory, by_worker = fit(_peaks(page, "threads"))
    by_worker -= FIRST_EXPERTS * by_expert
    return Method(start, slope, expert / EXPERT_SIZE, memory, by_worker, by_expert)


def read_adapter(page: str) -> float:
    """Read off docs/scale.md the CPU seconds of an adapter of rank 16, per billion parameters."""
    found = re.search(r"([\d.]+) per adapter and billion parameters", page)
    if found is None:
        raise SystemExit("docs/scale.md has no line of adapters: run make bench ARGS=workers")
    return float(found[1])


def _line(page: str, axis: str, unit: str) -> tuple[float, float]:
    """Start and slope of the line of task arithmetic, which comes first."""
    found = re.search(
        rf"^\| CPU s against {axis}, line \| ([\d.]+) \+ ([\d.]+) {unit} \|", page, re.MULTILINE
    )
    if found is None:
        raise SystemExit(
            f"docs/benchmarks.md has no line against {axis}: run make bench ARGS=scaling"
        )
    return float(found[1]), float(found[2])


def _peaks(page: str, axis: str) -> list[tuple[float, float]]:
    """MiB of task arithmetic by the number of experts or threads."""
    rows = re.findall(rf"^\| {axis} \| (\d+) \|(.*)\|$", page, re.MULTILINE)
    return [(float(n), float(row.split("|")[2])) for n, row in rows]


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Fit start and slope by least squares."""
    n = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    return mean_y - slope * mean_x, slope


# -- what the jobs take ------------------------------------------------------------------------------


def merge_seconds(job: Merge, method: Method, rates: Rates) -> dict[str, float]:
    """Seconds that each part of a merge would take alone; `alone` comes after all others."""
    moved = job.bytes_in + job.bytes_out
    cpu = method.cpu(job.billions, job.n_experts, job.n_nodes)
    return {
        "the server's link": moved / rates.server_link,
        "the server's disk": moved / rates.disk,
        "the nodes' links": moved / job.n_nodes / rates.node_link,
        "the nodes' cores": cpu / (job.n_nodes * rates.cores),
        "alone": job.bytes_out / rates.hash,
    }


def merge_total(parts: Mapping[str, float]) -> tuple[float, str]:
    """Seconds of a merge, and the part that it waits for."""
    slowest = max((name for name in parts if name != "alone"), key=lambda name: parts[name])
    return parts[slowest] + parts["alone"], slowest


def registry_parts(
    job: Registry, method: Method, adapter: float, rates: Rates
) -> dict[str, tuple[float, str]]:
    """How much of each bound a night uses up, 1 for all of it, with the figure in words.

    The merge runs after the night, in as many hours.
    """
    sent = job.n_sites * job.delta
    night = rates.night * 3600
    cpu, mib = method.cpu(job.billions, job.n_sites), method.peak(job.n_sites, rates.cores)
    if job.widest is not None:  # one model with all of them is converted
        cpu = method.cpu(job.billions, 0) + job.n_sites * job.billions * adapter
        kept = (
            4 * RANK * job.widest / 2**20
        )  # each worker keeps the widest A (AdaptedModel.work_bytes)
        mib = method.peak(0, rates.cores) + rates.cores * job.n_sites * kept
    peak = mib * 2**20 / 1e9
    days = rates.storage * 1e6 / sent
    return {
        "uplink": (sent / rates.uplink / night, seconds(sent / rates.uplink)),
        "disk": (sent / rates.disk / night, seconds(sent / rates.disk)),
        "checks": (sent / rates.hash / night, f"{seconds(sent / rates.hash)} of CPU"),
        "merge": (cpu / rates.cores / night, f"{seconds(cpu)} of CPU"),
        "memory": (peak / rates.node_memory, f"{peak:.1f} GB"),
        "kept for 30 days": (30 / days, f"{30 * sent / 1e6:,.1f} TB"),
    }


def first_to_break(parts: Mapping[str, tuple[float, str]], n_sites: int) -> tuple[str, int]:
    """Name the bound that is reached first as sites are added, and with how many; all grow with them."""
    name = max(parts, key=lambda one: parts[one][0])
    return name, int(n_sites / parts[name][0])


# -- tables ------------------------------------------------------------------------------------------

LLAMA_70B = 70.6
_HUGE = 128256 * 8192 / 1e9  # its embedding
MERGES = (
    Merge("Q4_K_M, 1 node", LLAMA_70B, 8, 1, "Q4_K_M", _HUGE),
    Merge("Q4_K_M, 4 nodes", LLAMA_70B, 8, 4, "Q4_K_M", _HUGE),
    Merge("Q4_K_M, 16 nodes", LLAMA_70B, 8, 16, "Q4_K_M", _HUGE),
    Merge("BF16, 16 nodes", LLAMA_70B, 8, 16, "BF16", _HUGE),
    Merge("BF16, 16 nodes, read three times", LLAMA_70B, 8, 16, "BF16", _HUGE, passes=3),
)
# Matrices of a layer of Mistral-7B, as (rows, columns): q, k, v, o, gate, up, down.
MISTRAL: tuple[tuple[int, int], ...] = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096))
MISTRAL += ((14336, 4096), (14336, 4096), (4096, 14336))
MISTRAL_7B = 7.24
REGISTRIES = (
    Registry("LoRA of rank 16", 1000, lora_size(RANK, MISTRAL, 32), MISTRAL_7B, widest=14336),
    Registry("whole 7B, Q4_K_M", 1000, size(MISTRAL_7B, "Q4_K_M"), MISTRAL_7B),
)


def seconds(value: float) -> str:
    """Write a time: 0.4 s, 12 s, 3 min, 4.1 h."""
    if value < 10:
        return f"{value:.1f} s"
    if value < 180:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines) + "\n"


def merge_table(method: Method, rates: Rates) -> str:
    """Return the table of merges, one column each."""
    header = ["70B, 8 experts", *(job.name for job in MERGES)]
    found = [merge_seconds(job, method, rates) for job in MERGES]
    rows = [["read, GB", *(f"{job.bytes_in / 1e3:,.0f}" for job in MERGES)]]
    rows += [["written, GB", *(f"{job.bytes_out / 1e3:,.0f}" for job in MERGES)]]
    rows += [[name, *(seconds(parts[name]) for parts in found)] for name in found[0]]
    rows[-1][0] = "SHA-256 of the output, alone"
    rows += [["in all", *(seconds(merge_total(parts)[0]) for parts in found)]]
    rows += [["waits for", *(merge_total(parts)[1] for parts in found)]]
    peaks = [method.peak(job.n_experts, rates.cores) for job in MERGES]
    rows += [["memory of a node, MiB", *(f"{mib:.0f}" for mib in peaks)]]
    parts = [job.largest / job.billions * job.n_nodes * rates.cores for job in MERGES]
    rows += [["largest tensor, of a worker's part", *(f"{100 * part:.0f} %" for part in parts)]]
    return table(header, rows)


def registry_table(method: Method, adapter: float, rates: Rates) -> str:
    """Return the table of nights, one column each."""
    found = [registry_parts(job, method, adapter, rates) for job in REGISTRIES]
    header = ["1000 sites, one night", *(job.name for job in REGISTRIES)]
    rows = [["one delta, MB", *(f"{job.delta:,.0f}" for job in REGISTRIES)]]
    rows += [["sent, GB", *(f"{job.n_sites * job.delta / 1e3:,.0f}" for job in REGISTRIES)]]
    for name in found[0]:
        cells = [f"{text} ({100 * used:,.0f} %)" for used, text in (one[name] for one in found)]
        rows.append([name, *cells])
    breaks = [
        first_to_break(parts, job.n_sites) for parts, job in zip(found, REGISTRIES, strict=True)
    ]
    rows += [["breaks first, at", *(f"{name}, {n:,} sites" for name, n in breaks)]]
    return table(header, rows)


def assumptions(rates: Rates) -> str:
    """Return the rates in words."""
    return (
        f"Assumed: {rates.node_link:.0f} MB/s to each node, {rates.server_link:.0f} MB/s to the file server, "
        f"{rates.disk:.0f} MB/s of its disk,\n{rates.cores} cores and {rates.node_memory:.0f} GB for a node, "
        f"{rates.hash:.0f} MB/s of SHA-256 on a core. The registry has {rates.uplink:.0f} MB/s,\n"
        f"{rates.night:.0f} hours and {rates.storage:.0f} TB.\n"
    )


def report(rates: Rates | None = None) -> str:
    """Return what docs/scale.md quotes."""
    rates = rates or Rates()
    method = read_method(BENCHMARKS.read_text(encoding="utf-8"))
    adapter = read_adapter(SCALE.read_text(encoding="utf-8"))
    return "\n".join(
        (assumptions(rates), merge_table(method, rates), registry_table(method, adapter, rates))
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for one in fields(Rates):
        kind = int if one.name == "cores" else float
        parser.add_argument(f"--{one.name.replace('_', '-')}", type=kind, default=one.default)
    print(report(replace(Rates(), **vars(parser.parse_args(argv)))), end="")


if __name__ == "__main__":
    main()
