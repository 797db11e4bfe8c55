"""Time and memory of a merge against parameters, experts, budget and threads: is it linear, and memory flat?

    benchmarks/bench_scaling.py [--with-7b] [--work FOLDER]

One of the four varies at a time, from 1.1B parameters (160M where experts vary), two experts, 512 MiB and
two threads. Models are Q4_K_M and are merged to Q4_K_M; tools/make_gguf.py makes them once in --work: 5 GB,
and 13 more for 7B. Llama-160M stands in for SmolLM2's 135M, whose rows of 576 no K-quant can hold: llama.cpp
gives it other types, and its time per parameter would be that of other encoders. Each point is a fresh
process; of some runs the one of least CPU time counts. Straight lines are fitted to CPU time by least squares
of relative deviations, and the largest deviation from them is stated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from charts import COLOURS, INK, SOFT, new_figure, save
from measure import CACHE, FIGURES, Merge, finish, make_gguf, table

FILE_TYPE = "Q4_K_M"
METHODS: dict[str, dict[str, float]] = {"task_arithmetic": {}, "ties": {"density": 0.5}}
SHAPES = ("zoo", "llama-160m", "tinyllama")
LARGE = "mistral-7b"
EXPERTS = (2, 4, 8, 16)
BUDGETS = (128, 192, 256, 384, 512, 1024, 2048, 4096)  # MiB; those below the least are left out
THREADS = (1, 2)
AXES = ("parameters", "experts", "budget", "threads")


@dataclass(frozen=True)
class Point:
    """One merge to measure."""

    shape: str = "tinyllama"
    experts: int = 2
    budget: int = 512  # MiB
    threads: int = 2


@dataclass(frozen=True)
class Figures:
    """What one merge took."""

    method: str
    axis: str
    point: Point
    parameters: int
    workers: int
    wall_s: float
    cpu_s: float
    peak_mib: float

    @property
    def x(self) -> float:
        """Where it stands on its axis."""
        if self.axis == "parameters":
            return self.parameters / 1e9
        return float(getattr(self.point, self.axis))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=CACHE)
    parser.add_argument("--shape", default="tinyllama", help="where budget and threads vary")
    parser.add_argument("--with-7b", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--figure", type=Path, default=FIGURES / "scaling.png")
    options = parser.parse_args()
    bench = Bench(options.work, options.repeats)
    shapes = [shape for shape in SHAPES if shape != "tinyllama" or options.shape == "tinyllama"]
    shapes += [LARGE] if options.with_7b else []
    found = [
        bench.measure(method, axis, point)
        for axis in AXES
        for method in METHODS
        for point in bench.points(axis, method, options.shape, shapes)
    ]
    lines = {axis: fits(found, axis) for axis in ("parameters", "experts")}
    draw(found, lines, options.figure)
    finish(
        "scaling",
        f"{render(found)}\n\n{render_claims(found, lines)}",
        [asdict(one) for one in found],
        lines={
            axis: {method: asdict(line) for method, line in of.items()}
            for axis, of in lines.items()
        },
    )


class Bench:
    """Measures points, each once, on models that are made when first needed."""

    def __init__(self, work: Path, repeats: int) -> None:
        self._work = work
        self._repeats = repeats
        self._known: dict[tuple[str, Point], Figures] = {}

    def points(self, axis: str, method: str, shape: str, shapes: Sequence[str]) -> Iterable[Point]:
        """Vary one thing."""
        centre = Point(shape=shape)
        if axis == "parameters":
            return [replace(centre, shape=name) for name in shapes]
        if axis == "experts":
            small = replace(centre, shape="llama-160m")
            return [replace(small, experts=count) for count in EXPERTS]
        if axis == "threads":
            return [replace(centre, threads=count) for count in THREADS]
        least = {name: self._merge(name, centre).least_mib() for name in METHODS}
        budgets = [least[method], *(mib for mib in BUDGETS if mib > max(least.values()))]
        return [replace(centre, budget=mib) for mib in budgets]

    def measure(self, method: str, axis: str, point: Point) -> Figures:
        """Run one point some times; the run of least CPU time counts."""
        if (method, point) not in self._known:
            self._known[method, point] = self._run(method, axis, point)
            print(f"  {self._known[method, point]}", file=sys.stderr)
        return replace(self._known[method, point], axis=axis)

    def _run(self, method: str, axis: str, point: Point) -> Figures:
        merge, output = self._merge(method, point), self._work / "scaled.gguf"
        limits: dict[str, Any] = {"memory": f"{point.budget}MiB", "threads": point.threads}
        if not any(known == method for known, _ in self._known):
            merge.run(output, **limits)  # compiles what is not compiled
        repeats = 1 if point.shape == LARGE else self._repeats
        runs = [merge.run(output, **limits) for _ in range(repeats)]
        cost, report = min(runs, key=lambda run: run[0].cpu_s)
        return Figures(
            method=method,
            axis=axis,
            point=point,
            parameters=report["elements"],
            workers=report["workers"],
            wall_s=min(run[0].wall_s for run in runs),
            cpu_s=cost.cpu_s,
            peak_mib=max(run[1]["peak_rss_bytes"] for run in runs) / 2**20,
        )

    def _merge(self, method: str, point: Point) -> Merge:
        models = make_gguf(self._work, point.shape, FILE_TYPE, point.experts)
        return Merge.of(method, models, FILE_TYPE, METHODS[method])


# -- lines -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """y = start + slope x, and how well it holds."""

    start: float
    slope: float
    deviation: float  # largest, relative to the line
    r_squared: float

    def at(self, x: float) -> float:
        """Return the line's y."""
        return self.start + self.slope * x


def fit(points: Sequence[tuple[float, float]]) -> Line:
    """Fit by weighted least squares, weights 1/y^2: a second matters more at two than at two hundred."""
    weights = [1 / y**2 for _, y in points]
    total = sum(weights)
    mean_x, mean_y = (
        sum(w * point[i] for w, point in zip(weights, points, strict=True)) / total for i in (0, 1)
    )
    spread = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    shared = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True))
    slope = shared / spread
    start = mean_y - slope * mean_x
    plain_mean = sum(y for _, y in points) / len(points)
    left = sum((y - start - slope * x) ** 2 for x, y in points)
    return Line(
        start,
        slope,
        deviation=max(abs(y / (start + slope * x) - 1) for x, y in points),
        r_squared=1 - left / sum((y - plain_mean) ** 2 for _, y in points),
    )


def fits(found: Sequence[Figures], axis: str) -> dict[str, Line]:
    """Fit CPU time along an axis, per method."""
    return {
        method: fit([(one.x, one.cpu_s) for one in select(found, axis, method)])
        for method in METHODS
    }


def select(found: Sequence[Figures], axis: str, method: str) -> list[Figures]:
    return [one for one in found if (one.axis, one.method) == (axis, method)]


# -- tables and figure -------------------------------------------------------------------------------------


def render(found: Sequence[Figures]) -> str:
    """Return the table of all points, methods side by side."""
    header = ["what varies", ""]
    header += [
        f"{method}{what}" for method in METHODS for what in (": wall s", " CPU s", " peak MiB")
    ]
    lines = []
    for axis in AXES:
        sides = [select(found, axis, method) for method in METHODS]
        for row in zip(*sides, strict=True):
            cells = [f"{axis}", name(axis, row)]
            for one in row:
                cells += [f"{one.wall_s:.1f}", f"{one.cpu_s:.1f}", f"{one.peak_mib:.0f}"]
            lines.append(cells)
    return table(header, lines)


def name(axis: str, row: Sequence[Figures]) -> str:
    """Name a point; the least budget is another for every method."""
    if axis == "parameters":
        return f"{row[0].parameters / 1e6:,.0f}M"
    if axis == "budget":
        return ", ".join(dict.fromkeys(f"{one.point.budget} MiB" for one in row))
    return f"{row[0].x:.0f}"


def render_claims(found: Sequence[Figures], lines: Mapping[str, Mapping[str, Line]]) -> str:
    """Return the table that checks what is claimed."""
    units = {"parameters": "per billion parameters", "experts": "per expert of 160M"}
    rows = []
    for axis, unit in units.items():
        of = lines[axis]
        cells = [f"{line.start:.2f} + {line.slope:.2f} {unit}" for line in of.values()]
        rows.append([f"CPU s against {axis}, line", *cells])
        cells = [f"{100 * line.deviation:.1f} %, {line.r_squared:.4f}" for line in of.values()]
        rows.append(["largest deviation from it, R²", *cells])
        peaks = [[one.peak_mib for one in select(found, axis, method)] for method in METHODS]
        cells = [f"{min(mib):.0f} to {max(mib):.0f} MiB" for mib in peaks]
        rows.append([f"peak memory over all {axis}, budget 512 MiB", *cells])
    spare = [
        min(one.point.budget - one.peak_mib for one in found if one.method == method)
        for method in METHODS
    ]
    rows.append(["least distance of a peak to its budget", *(f"{mib:.0f} MiB" for mib in spare)])
    return table(["", *METHODS], rows)


def draw(found: Sequence[Figures], lines: Mapping[str, Mapping[str, Line]], path: Path) -> None:
    """Draw CPU time above and peak memory below, against parameters, experts and budget."""
    shown = {
        "parameters": "billion parameters",
        "experts": "experts (160M)",
        "budget": "budget, MiB",
    }
    figure, axes = new_figure((9.5, 4.8), 2, len(shown), sharex="col")
    for column, (axis, label) in enumerate(shown.items()):
        above, below = axes[0][column], axes[1][column]
        for method, colour in zip(METHODS, COLOURS, strict=False):
            points = select(found, axis, method)
            x = [one.x for one in points]
            style: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 4}
            style["linestyle"] = "none" if axis in lines else "-"
            above.plot(x, [one.cpu_s for one in points], label=method, **style)
            below.plot(x, [one.peak_mib for one in points], **{**style, "linestyle": "-"})
            if axis in lines:
                draw_line(above, lines[axis][method], x, colour)
        draw_budget(below, axis, found)
        below.set_xlabel(label)
        set_scales(above, below, axis)
    axes[0][0].set_ylabel("CPU seconds")
    axes[1][0].set_ylabel("peak memory, MiB")
    handles, names = axes[0][2].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=2, frameon=False)
    save(figure, path)


def draw_line(panel: Any, line: Line, x: Sequence[float], colour: str) -> None:
    """Draw a fitted line over the points' range."""
    ends = min(x), max(x)
    panel.plot(ends, [line.at(end) for end in ends], color=colour, linewidth=1)


def draw_budget(panel: Any, axis: str, found: Sequence[Figures]) -> None:
    """Draw what memory must stay below."""
    style: dict[str, Any] = {"color": SOFT, "linestyle": "--", "linewidth": 1}
    if axis == "budget":
        budgets = sorted({one.point.budget for one in found if one.axis == axis})
        panel.plot(budgets, budgets, **style)
        place = budgets[len(budgets) // 2]
        panel.annotate(
            "budget", (place, place), (-6, 2), textcoords="offset points", ha="right", color=INK
        )
        return
    panel.axhline(512, **style)
    panel.annotate(
        "budget",
        (0.02, 512),
        (0, 3),
        xycoords=panel.get_yaxis_transform(),
        textcoords="offset points",
        color=INK,
    )


def set_scales(above: Any, below: Any, axis: str) -> None:
    """Let everything begin at zero, but budgets, which double."""
    above.set_ylim(bottom=0)
    if axis == "experts":
        below.set_xticks(EXPERTS)
        below.set_xlim(left=0)
    if axis == "budget":
        above.set_xscale("log", base=2)
        below.set_yscale("log", base=2)
        for scale in (below.xaxis, below.yaxis):
            scale.set_major_formatter("{x:g}")
    else:
        below.set_ylim(0, 600)


if __name__ == "__main__":
    main()
