"""A merge's report as one HTML page without scripts, fonts or links: it opens anywhere, offline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from edgemerge.output.file import write_file
from edgemerge.output.report import MergeReport
from edgemerge.sizes import format_count, format_size

__all__ = ["write_page"]

BAR_WIDTH = 560  # SVG units
STYLE = """
:root { color-scheme: light dark;
  --ink: #1d2a36; --paper: #fbfbf9; --bar: #2a7f9e; --rest: #d9dfe3; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e9ed; --paper: #14191e; --bar: #56b3d3; --rest: #33404b; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 46rem; margin: 2.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.05rem; margin-top: 2rem; }
svg { width: 100%; height: auto; } text { fill: var(--ink); font-size: 13px; }
td { padding: .15rem 1.2rem .15rem 0; vertical-align: top; } code { word-break: break-all; }
"""


def write_page(report: MergeReport, path: Path, made: Sequence[tuple[str, str]] = ()) -> None:
    """Write the page, replacing one that is there by a whole one.

    Parameters
    ----------
    report : MergeReport
        What was done.
    path : Path
        The page.
    made : sequence of (str, str)
        Names and values of how, of what, where and when.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    write_file(path, "\n".join(_page(report, made)).encode("utf-8", "backslashreplace"))


def _page(report: MergeReport, made: Sequence[tuple[str, str]]) -> Iterator[str]:
    yield "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
    name = escape(report.output.name)
    yield f"<title>{name}: edgemerge</title><style>{STYLE}</style></head><body><h1>{name}</h1>"
    yield (
        f"<p>{escape(report.method)} of {escape(', '.join(report.models))} to "
        f"{escape(report.file_type)}: {format_count(report.elements)} parameters "
        f"in {report.seconds:.1f} s.</p>"
    )
    yield "<h2>Memory of the process</h2>"
    yield from _bars(
        [("peak", report.peak_rss_bytes), ("budget", report.budget_bytes)], report.budget_bytes
    )
    yield "<h2>Bytes read and written</h2>"
    traffic = [("read", report.read_bytes), ("written", report.written_bytes)]
    yield from _bars(traffic, max(n for _, n in traffic))
    yield "<h2>Types in the output</h2>"
    yield from _bars(list(report.type_bytes.items()), report.out_bytes)
    yield "<h2>Details</h2><table>"
    for name, value in (
        *made,
        ("tensors", str(report.tensors)),
        ("reads of each input", f"at most {report.passes}"),
        ("workers", str(report.workers)),
        ("size", f"{report.out_bytes:,} bytes"),
        ("sha256", report.sha256),
        *(("note", note) for note in report.notes),
    ):
        yield f"<tr><td>{escape(name)}</td><td><code>{escape(value)}</code></td></tr>"
    yield "</table></body></html>"


def _bars(values: Sequence[tuple[str, int]], whole: int) -> Iterator[str]:
    yield f"<svg viewBox='0 0 {BAR_WIDTH + 200} {28 * len(values)}' role='img'>"
    for i, (name, value) in enumerate(values):
        y = 28 * i
        width = BAR_WIDTH * min(1.0, value / max(1, whole))
        yield f"<text x='0' y='{y + 17}'>{escape(name)}</text>"
        yield (
            f"<rect x='80' y='{y + 4}' width='{BAR_WIDTH}' height='18' rx='3' fill='var(--rest)'/>"
        )
        yield (
            f"<rect x='80' y='{y + 4}' width='{width:.1f}' height='18' rx='3' fill='var(--bar)'/>"
        )
        yield f"<text x='{BAR_WIDTH + 90}' y='{y + 17}'>{escape(format_size(value))}</text>"
    yield "</svg>"
