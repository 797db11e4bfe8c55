"""What is asked of pip-audit's service, and what is made of its answers."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from tools import audit

SOUND = {"name": "numpy", "version": "2.0", "vulns": []}
UNKNOWN = {"name": "numba", "skip_reason": "not found"}
FLAWED = {
    "name": "rich",
    "version": "13.7",
    "vulns": [{"id": "CVE-1", "fix_versions": ["14.0"]}, {"id": "CVE-2", "fix_versions": []}],
}


def test_all_that_is_needed_to_run_is_asked_for() -> None:
    pins = list(audit.list_needs("edgemerge", audit.EXTRAS, set()))
    names = [pin.partition("==")[0] for pin in pins]
    assert {"numpy", "llvmlite", "jinja2", "cryptography"} <= set(names)
    assert not {"pytest", "ruff", "edgemerge"} & set(names)


@pytest.mark.parametrize(
    ("packages", "code", "words"),
    [
        (None, 0, "SKIPPED: pip-audit cannot reach its service"),
        ([UNKNOWN], 0, "SKIPPED: pip-audit's service knows none of the 1 packages"),
        ([SOUND, UNKNOWN], 0, "1 of 2 packages audited, 0 vulnerabilities known"),
        (
            [SOUND, FLAWED],
            1,
            "rich 13.7: CVE-1, fixed in 14.0\nrich 13.7: CVE-2, fixed in no version",
        ),
    ],
)
def test_only_a_known_vulnerability_fails(
    packages: list[dict[str, Any]] | None,
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answer = None if packages is None else {"dependencies": packages}
    monkeypatch.setattr(audit, "ask", lambda _pins: answer)
    assert audit.main() == code
    told = capsys.readouterr()
    assert words in told.out + told.err


def test_no_answer_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert audit.ask(["numpy==2.0"]) is None
