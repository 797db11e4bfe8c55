"""The record of a merged model: one page that an auditor reads and files.

It says what the file is, what it was made of and how, what it scored and what it takes, when and where that
was found. Like the page of a merge it has no scripts, fonts or links.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from edgemerge.reports.page import STYLE

__all__ = ["Record", "Section", "record_page"]

_STYLE = """
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: 600; padding: .15rem 1.2rem .15rem 0; vertical-align: top; }
td code { word-break: normal; overflow-wrap: anywhere; }
th, td { border-bottom: 1px solid var(--rest); }
.good::before { content: "\\2713\\00a0"; } .bad::before { content: "\\2717\\00a0"; }
.bad { font-weight: 600; } @media print { body { margin: 0; max-width: none; } }
"""


@dataclass(frozen=True, slots=True)
class Section:
    """One heading, sentences under it, and a table.

    Attributes
    ----------
    title : str
        The heading.
    sentences : sequence of (str, bool or None)
        What to say; True marks it as checked, False as failed, None as neither.
    header : sequence of str
        Names of the columns; empty where the first column names the rows.
    rows : sequence of sequence of str
        The table.
    picture : str
        SVG of our own, put in as it is.
    """

    title: str
    sentences: Sequence[tuple[str, bool | None]] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = field(default_factory=tuple)
    picture: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """A title and sections."""

    title: str
    sections: tuple[Section, ...]

    def as_json(self) -> Mapping[str, object]:
        """Return plain types only."""
        return {
            "title": self.title,
            "sections": [
                {
                    "title": section.title,
                    "sentences": [
                        {"text": text, "holds": holds} for text, holds in section.sentences
                    ],
                    "header": list(section.header),
                    "rows": [list(row) for row in section.rows],
                }
                for section in self.sections
            ],
        }


def record_page(record: Record) -> str:
    """Write a record as HTML; every text in it is a stranger's and is escaped."""
    return "\n".join(_page(record))


def _page(record: Record) -> Iterator[str]:
    title = escape(record.title)
    yield "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
    yield f"<title>{title}</title><style>{STYLE}{_STYLE}</style></head><body><h1>{title}</h1>"
    for section in record.sections:
        yield f"<h2>{escape(section.title)}</h2>"
        for text, holds in section.sentences:
            kind = {True: " class='good'", False: " class='bad'", None: ""}[holds]
            yield f"<p{kind}>{escape(text)}</p>"
        if section.picture:
            yield section.picture
        if section.rows:
            yield from _table(section)
    yield "</body></html>"


def _table(section: Section) -> Iterator[str]:
    yield "<table>"
    if section.header:
        yield "<tr>" + "".join(f"<th>{escape(name)}</th>" for name in section.header) + "</tr>"
    for first, *rest in section.rows:
        tag = "td" if section.header else "th"
        cells = "".join(f"<td><code>{escape(cell)}</code></td>" for cell in rest)
        yield f"<tr><{tag}>{escape(first)}</{tag}>{cells}</tr>"
    yield "</table>"
