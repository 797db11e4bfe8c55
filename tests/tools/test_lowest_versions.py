"""The lowest versions that pyproject.toml allows, as constraints."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.lowest_versions import ROOT, constraints

PYPROJECT = """
[project]
dependencies = ["numpy>=2.0,<3"]
[project.optional-dependencies]
run = ["jinja2>=3.1,<4"]
serve = ["jinja2>=3.1,<4", "llama-cpp-python[server]>=0.3.36,<0.4"]
plot = []
sign = [{sign}]
hub = []
search = []
fleet = []
dev = ["ruff>=0.11"]
"""


def test_each_is_named_once_and_none_for_development(tmp_path: Path) -> None:
    path = tmp_path / "pyproject.toml"
    path.write_text(PYPROJECT.format(sign=""))
    assert constraints(path) == ["jinja2==3.1", "llama-cpp-python==0.3.36", "numpy==2.0"]


def test_a_requirement_without_a_lowest_version_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "pyproject.toml"
    path.write_text(PYPROJECT.format(sign='"cryptography"'))
    with pytest.raises(ValueError, match="cryptography names no lowest version"):
        constraints(path)


def test_all_of_ours_have_one() -> None:
    assert len(constraints(ROOT / "pyproject.toml")) > 10
