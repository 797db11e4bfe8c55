"""Rows of scored merges as Markdown: accuracies with intervals, each paired with task arithmetic, costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from measure import table
from quality_rows import REFERENCE, Row
from quality_scores import MEDICAL, SETS, Asked, Figures, distinct_words, marks_of

from edgemerge.runtime.evaluation.evaluate import compare

HALF_WIDTH = 1.96  # of a 95 % interval, in standard errors
HEADER = (
    "merge",
    *SETS,
    "both domains, over task arithmetic",
    "general, over it",
    "perplexity",
    "distinct words",
    "CPU s",
    "peak MiB",
    "settings from",
)
NAMES = {"models": "", "paper": "paper: ", "ours": "", "shuffled": "shuffled: "}
NAMES["aligned"] = "shuffled, aligned: "


def render(rows: Sequence[tuple[Row, Figures]], asked: Asked) -> str:
    """Return a table; the reference must be among its rows."""
    references = [found for row, found in rows if row.label == REFERENCE and found]
    if not references:
        raise SystemExit(f"all are compared with {REFERENCE}, which is not scored yet")
    cells = [_cells(row, found, references[0], asked) for row, found in rows]
    kept = [i for i, column in enumerate(zip(*cells, strict=True)) if any(column)]
    return table([HEADER[i] for i in kept], [[line[i] for i in kept] for line in cells])


def _cells(row: Row, found: Figures, reference: Figures, asked: Asked) -> list[str]:
    cells = [NAMES[row.group] + row.label]
    if not found:
        return [*cells, "not scored yet", *[""] * (len(HEADER) - 2)]
    cells += [percent(found["sets"][name]["score"]) for name in SETS]
    for names in (MEDICAL, SETS[2:]):
        cells.append("" if found is reference else _against(reference, found, asked, names))
    value, stderr = found["perplexity"]
    cells.append(f"{value:.2f} ± {HALF_WIDTH * stderr:.2f}")
    cells.append(f"{100 * distinct_words(found['answers']):.0f} %" if found["answers"] else "")
    cells += [f"{found['cpu_s']:.1f}", f"{found['peak_mib']:.0f}"]
    return [*cells, "" if row.group == "models" else row.settings]


def percent(score: Mapping[str, float]) -> str:
    """Write an accuracy with its 95 % interval."""
    return f"{100 * score['acc']:.1f} ± {100 * HALF_WIDTH * score['stderr']:.1f}"


def _against(first: Figures, second: Figures, asked: Asked, names: Sequence[str]) -> str:
    """Write the points over the reference on the same questions, and McNemar's p."""
    marks = [
        [one for name in names for one in marks_of(sheet, asked.tasks[name], name)]
        for sheet in (first, second)
    ]
    found = compare(*marks)
    p = f"p {found.p:.3f}" if found.p >= 0.0005 else "p < 0.001"
    return f"{100 * found.difference:+.1f}, {p}"


def answers(rows: Sequence[tuple[Row, Figures]], asked: Asked) -> str:
    """Return one table a prompt: what each model says."""
    tables = []
    for i, prompt in enumerate(asked.prompts):
        lines = [[NAMES[row.group] + row.label, _in_a_cell(f["answers"][i])] for row, f in rows]
        tables.append(table(["merge", prompt], lines))
    return "\n\n".join(tables)


def _in_a_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
