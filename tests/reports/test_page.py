from __future__ import annotations

import errno
import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from edgemerge.errors import OutputError
from edgemerge.output.report import MergeReport, peak_rss_bytes
from edgemerge.reports.page import write_page
from edgemerge.sizes import format_count

MIB = 1 << 20
REPORT = MergeReport(
    output=Path("out/merged.gguf"),
    out_bytes=10 * MIB,
    method="ties",
    models=("base", "a", "b"),
    file_type="Q4_K_M",
    type_bytes={"Q4_K": 6 * MIB, "Q6_K": 3 * MIB},
    tensors=38,
    elements=3_413_248,
    seconds=1.25,
    budget_bytes=512 * MIB,
    peak_rss_bytes=160 * MIB,
    read_bytes=60 * MIB,
    written_bytes=10 * MIB,
    passes=3,
    workers=2,
    resumed_tensors=0,
    damaged_tensors=0,
    sha256="ab" * 32,
    notes=("a spells some tokens differently from base",),
)
CONTRACT = {
    "output",
    "out_bytes",
    "method",
    "tensors",
    "elements",
    "seconds",
    "budget_bytes",
    "peak_rss_bytes",
    "read_bytes",
    "written_bytes",
    "passes",
    "workers",
    "resumed_tensors",
    "sha256",
}


def test_lines_for_people() -> None:
    assert list(REPORT.lines()) == [
        "out/merged.gguf  10 MiB, Q4_K_M, ties",
        "  38 tensors, 3.4 M parameters in 1.2 s with 2 workers",
        "  memory 160 MiB at peak of 512 MiB, read 60 MiB, wrote 10 MiB",
        f"  sha256 {'ab' * 32}",
        "  note: a spells some tokens differently from base",
    ]
    alone = replace(REPORT, workers=1, resumed_tensors=5, notes=(), elements=22_688)
    assert list(alone.lines())[1] == (
        "  38 tensors, 5 taken over, 22.7 K parameters in 1.2 s with 1 worker"
    )
    damaged = replace(REPORT, resumed_tensors=5, damaged_tensors=2)
    assert list(damaged.lines())[1] == (
        "  38 tensors, 5 taken over, 2 found damaged and made again, 3.4 M parameters in 1.2 s "
        "with 2 workers"
    )


def test_json_has_the_fields_of_the_contract_and_plain_types() -> None:
    document = REPORT.as_json()
    assert set(document) >= CONTRACT
    assert document["output"] == "out/merged.gguf"
    assert json.loads(json.dumps(document, allow_nan=False))["notes"] == list(REPORT.notes)


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0.0 K"), (22_688, "22.7 K"), (3_413_248, "3.4 M"), (7 * 10**9, "7,000.0 M")],
)
def test_counts_for_people(n: int, text: str) -> None:
    assert format_count(n) == text


def test_the_peak_is_this_processes() -> None:
    assert 10 * MIB < peak_rss_bytes() < 1 << 40


# -- the page --------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Collects text and tags, and complains of what is not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def page(report: MergeReport, folder: Path) -> Page:
    path = folder / "report.html"
    write_page(report, path)
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_shows_the_figures(tmp_path: Path) -> None:
    text = "\n".join(page(REPORT, tmp_path).texts)
    for shown in ("merged.gguf", "ties of base, a, b to Q4_K_M", "3.4 M parameters", "160 MiB"):
        assert shown in text
    for shown in ("60 MiB", "Q6_K", "10,485,760 bytes", "ab" * 32, *REPORT.notes):
        assert shown in text


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    write_page(REPORT, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|<script|<link|@import|url\(", html)


def test_bars_are_as_long_as_their_share(tmp_path: Path) -> None:
    widths = [float(a["width"] or 0) for tag, a in page(REPORT, tmp_path).seen if tag == "rect"]
    whole = widths[0]
    assert widths[1] / whole == pytest.approx(160 / 512, abs=1e-3)  # peak of the budget
    assert widths[3] / whole == 1.0  # the budget itself
    assert widths[7] / whole == pytest.approx(10 / 60, abs=1e-3)  # written, of read
    over = replace(REPORT, peak_rss_bytes=600 * MIB)
    assert max(
        float(a["width"] or 0) for tag, a in page(over, tmp_path).seen if tag == "rect"
    ) == pytest.approx(whole)


def test_names_are_text_not_markup(tmp_path: Path) -> None:
    hostile = "<b onclick='x'>&\"</b>"
    found = page(replace(REPORT, models=(hostile,), notes=(hostile,)), tmp_path)
    assert "b" not in [tag for tag, _ in found.seen]
    assert hostile in "".join(found.texts)


def test_an_empty_merge_divides_by_nothing(tmp_path: Path) -> None:
    page(replace(REPORT, read_bytes=0, written_bytes=0, out_bytes=0, type_bytes={}), tmp_path)


def test_a_name_that_is_not_utf8_is_escaped(tmp_path: Path) -> None:
    found = page(replace(REPORT, output=Path("bad\udcff.gguf")), tmp_path)
    assert "bad\\udcff.gguf" in found.texts[-1] + "".join(found.texts)


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError) as caught:
        write_page(REPORT, tmp_path / "no" / "r.html")
    assert str(caught.value) == (
        f"{tmp_path}/no/r.html: cannot be written (No such file or directory)"
    )


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_page_that_is_interrupted_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """It was written in place, so a full disk left half a page and no old one."""
    path = tmp_path / "r.html"
    path.write_text("old")

    def fail(*_: object) -> int:
        raise error

    for call in ("pwrite", "pwritev", "write"):
        monkeypatch.setattr(os, call, fail)
    with pytest.raises((OutputError, KeyboardInterrupt)):
        write_page(REPORT, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
