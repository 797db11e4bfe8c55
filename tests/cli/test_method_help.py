"""`merge --help` ends with every method and its parameters."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from edgemerge.cli import make_app
from edgemerge.methods.table import METHODS


@pytest.mark.parametrize("command", ["merge", "plan"])
def test_help_lists_the_methods(command: str) -> None:
    text = CliRunner().invoke(make_app(), [command, "--help"]).stdout
    _, _, listed = text.partition("Methods (-m) and their parameters (-P):")
    words = {line.split()[0] for line in listed.splitlines() if line.strip()}
    assert set(METHODS) <= words
    assert "epsilon=0.15" in listed


def test_the_overview_says_whole_sentences_and_h_is_help() -> None:
    given: dict[str, Any] = {"terminal_width": 80}
    text = CliRunner().invoke(make_app(), ["-h"], **given).stdout
    assert "..." not in text.partition("Commands:")[2]
    assert text == CliRunner().invoke(make_app(), ["--help"], **given).stdout
    assert "Options:" in CliRunner().invoke(make_app(), ["search", "-h"], **given).stdout
