"""`merge --help` ends with every method and its parameters."""

from __future__ import annotations

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
