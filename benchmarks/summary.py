"""Write the README's table of four rows, and its picture, from the tables that the benchmarks wrote.

    benchmarks/summary.py

`benchmarks/run.py` calls it after every run. Nothing is measured here: each figure is a cell of a table in
docs/benchmarks.md or docs/quality.md, and the last column says which.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charts import COLOURS, INK, new_figure, save
from measure import FIGURES, ROOT, table

README = ROOT / "README.md"
SPEED, QUALITY = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "quality.md"
MARKED = "<!-- bench:{} -->\n(.*?)<!-- /bench -->"
METHODS = ("task_arithmetic", "ties")  # of the picture
MERGE = "covariance"  # it has no setting that could have been chosen by these questions
MODELS = {"base": "base", "disease": "expert a", "substance": "expert b", MERGE: "merge"}
CHAIN = "mergekit, convert, quantise"


@dataclass(frozen=True)
class Block:
    """One benchmark's table as it stands in a page, and its "Measured on" line."""

    header: list[str]
    rows: list[list[str]]
    about: dict[str, str]  # cpu, cores, python, ..., commit

    def row(self, *first: str) -> list[str]:
        """Return the row that begins with these cells."""
        found = [row for row in self.rows if row[: len(first)] == list(first)]
        if not found:
            raise SystemExit(f"the README's table needs a row {', '.join(first)}: measure it too")
        return found[0]

    @property
    def has_chain(self) -> bool:
        """Whether merges were measured beside their peers (`make bench-peers`)."""
        return "chain: wall s" in self.header


def read_block(page: Path, name: str) -> Block:
    """Read a benchmark's first table from its page."""
    found = re.search(MARKED.format(name), page.read_text(), re.DOTALL)
    if not found:
        raise SystemExit(f"{page} has no table of the benchmark {name}")
    first = found[1].partition("\n\n")[0].splitlines()
    header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in first)
    stamp = re.search(r"^Measured on: (.*)\.$", found[1], re.MULTILINE)
    assert stamp, f"{page} does not say where {name} was measured"
    pairs = (word.partition(" ") for word in stamp[1].split(", "))
    return Block(header, rows, {key: value for key, _, value in pairs})


def render() -> str:
    """Return the Markdown table of the README and where it was measured."""
    merge, big, serve = (read_block(SPEED, name) for name in ("merge", "7b", "serve"))
    quality = read_block(QUALITY, "quality135")
    ours = merge.row("task_arithmetic")
    small = big.row("task_arithmetic", "96MiB")
    loaded = serve.rows[0]
    a, b, both = (quality.row(name) for name in list(MODELS)[1:])
    header = ["what", "edgemerge", "to compare", "from"]
    rows = [
        [
            "three 1.1B models, bf16 to Q4_K_M, task arithmetic",
            f"{ours[2]} CPU s, {ours[3]} MiB at peak",
            f"{CHAIN}: {ours[6]} CPU s, {ours[7]} MiB" if merge.has_chain else "not measured",
            _source(SPEED, "merge", merge),
        ],
        [
            f"three 7B models in Q4_K_M, task arithmetic, budget {small[1]}",
            f"{small[3]} s, {small[2]} MiB at peak",
            f"reading the inputs alone: {small[8]} s",
            _source(SPEED, "7b", big),
        ],
        [
            f"SmolLM2-135M, two medical experts, `{MERGE}`: % right on diseases, on substances",
            f"{both[1]}, {both[2]}",
            f"expert a: {a[1]}, {a[2]}; expert b: {b[1]}, {b[2]}",
            _source(QUALITY, "quality135", quality),
        ],
        [
            f"the server, {loaded[1]} clients at once for {loaded[2]} s",
            f"{loaded[3]} requests: {loaded[4]} answered, {loaded[5]}, {loaded[6]} lost",
            f"resident memory at start, in the middle, at the end: {loaded[9]} MiB",
            _source(SPEED, "serve", serve),
        ],
    ]
    abouts = [block.about for block in (merge, big, serve, quality)]
    machines, rest = ("; ".join(sorted(set(map(of, abouts)))) for of in (_machine, _surroundings))
    return f"{table(header, rows)}\n\nMeasured on {machines}. {rest}. No board was measured."


def _machine(about: Mapping[str, str]) -> str:
    width = f", vectors of {about['vectors']}" if "vectors" in about else ""  # older stamps lack it
    return about["cpu"] + width


def _surroundings(about: Mapping[str, str]) -> str:
    return f"Cores: {about['cores']}, Python {about['python']}"


def _source(page: Path, name: str, block: Block) -> str:
    return f"[{name}]({page.relative_to(ROOT)}), commit {block.about['commit']}"


def draw(path: Path) -> None:
    """Draw what the merge knows, and what a merge costs."""
    quality, merge = read_block(QUALITY, "quality135"), read_block(SPEED, "merge")
    figure, axes = new_figure((10, 2.8), 1, 3)
    knows, time, memory = axes[0]
    for i, name in enumerate(("disease", "substance")):
        at = quality.header.index(name)
        cells = [quality.row(model)[at].split()[0] for model in MODELS]
        _bars(knows, cells, i, COLOURS[2 + i], name)
    knows.set_yticks(range(len(MODELS)), MODELS.values(), color=INK)
    knows.set_title("right answers, %")
    knows.axvline(25, color=INK, linewidth=0.8, linestyle=":")
    series = ("edgemerge", CHAIN) if merge.has_chain else ("edgemerge",)
    for panel, columns, title in (
        (time, (2, 6), "CPU s, merging 1.1B"),
        (memory, (3, 7), "peak MiB, merging 1.1B"),
    ):
        for i, (at, name) in enumerate(zip(columns, series, strict=False)):
            cells = [merge.row(method)[at] for method in METHODS]
            _bars(panel, cells, i, COLOURS[i], name)
        panel.set_yticks(range(len(METHODS)), ["task\narithmetic", "ties"], color=INK)
        panel.set_title(title)
    for panel in axes[0]:
        panel.invert_yaxis()
        panel.grid(axis="y", visible=False)
        panel.spines["left"].set_visible(False)
        panel.tick_params(axis="y", length=0)
        panel.margins(x=0.22)
    figure.get_layout_engine().set(rect=(0, 0.1, 1, 0.9))  # the legends stand below
    for panel in (knows, time):
        legend = panel.legend(
            loc="upper left", bbox_to_anchor=(0, -0.12), ncols=2, frameon=False, borderaxespad=0
        )
        legend.set_in_layout(False)
    save(figure, path)


def _bars(panel: Any, cells: list[str], number: int, colour: str, name: str) -> None:
    """Draw the bars of one of two series, and beside each its figure as the table has it."""
    places = [at + (number - 0.5) * 0.4 for at in range(len(cells))]
    bars = panel.barh(places, list(map(float, cells)), 0.36, color=colour, label=name)
    panel.bar_label(bars, cells, padding=3, color=INK, fontsize=8)


def write() -> None:
    """Write the README's block and its picture."""
    text, rendered = README.read_text(), render()
    pattern = re.compile(r"(<!-- bench:summary -->\n).*?(<!-- /bench -->)", re.DOTALL)
    README.write_text(pattern.sub(lambda found: f"{found[1]}{rendered}\n{found[2]}", text))
    draw(FIGURES / "summary.png")


if __name__ == "__main__":
    write()
