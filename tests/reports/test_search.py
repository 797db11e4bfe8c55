from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

from edgemerge.reports.record import Section
from edgemerge.reports.search import search_page


def trial(number: int, scores: list[float], value: float, word: str = "a") -> dict[str, Any]:
    score = scores[-1] if len(scores) == 3 else None
    return {
        "number": number,
        "scores": scores,
        "score": score,
        "is_kept": True,
        "values": {"<x>": value, "word": word},
    }


RESULT = {
    "recipe": "a&b.yml",
    "best": 2,
    "spaces": [
        {"name": "<x>", "low": 0.0, "high": 1.0, "is_log": False, "start": 0.5},
        {"name": "word", "options": ["a", "b"], "start": "a"},
    ],
    "trials": [
        trial(0, [50.0, 55.0, 60.0], 0.5),
        trial(1, [40.0], 0.1),
        trial(2, [60.0, 62.0, 70.0], 0.7, "b"),
        trial(3, [], 0.9),  # refused
    ],
}


def test_the_page_has_a_dot_for_each_trial_that_was_asked() -> None:
    page = search_page(RESULT, [Section("Found", [("a <b> & c", None)])])
    first, second = (part.partition("</svg>")[0] for part in page.split("<svg")[1:])
    assert first.count("<circle") == 3
    assert first.count("fill='none' stroke='var(--bar)'/>") == 1  # stopped early
    assert second.count("<circle") == 4  # two trials were asked all, for two settings
    assert second.count("fill='var(--ink)'") == 2
    assert "a &lt;b&gt; &amp; c" in page
    assert "&lt;x&gt;" in page
    assert "a&amp;b.yml" in page
    assert "<x>" not in page


def test_the_pictures_are_well_formed() -> None:
    for part in search_page(RESULT, []).split("<svg")[1:]:
        ET.fromstring(f"<svg{part.partition('</svg>')[0]}</svg>")


def test_equal_scores_divide_by_nothing() -> None:
    result = {**RESULT, "best": 0, "trials": [trial(0, [50.0, 50.0, 50.0], 0.5)]}
    assert "nan" not in search_page(result, [])
