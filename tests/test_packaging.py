"""What pyproject.toml declares is what the package needs, and brings."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Whoever uses a part of the package has its extras installed: by folder, and the narrower one decides.
EXTRAS = {
    "edgemerge/cli/bench.py": {"plot"},
    "edgemerge/cli/merge.py": {"sign"},
    "edgemerge/cli/sign.py": {"sign"},
    "edgemerge/cluster": {"cluster"},
    "edgemerge/merging/kit.py": {"cluster"},
    "edgemerge/provenance": {"sign"},
    "edgemerge/finding": {"hub"},
    "edgemerge/fleet/registry": {"fleet"},
    "edgemerge/formats/hidden_states.py": {"run"},
    "edgemerge/formats/template_child.py": {"run"},
    "edgemerge/formats/tokenizer/prompts.py": {"run"},
    "edgemerge/remote/stores": {"remote"},
    "edgemerge/reports": {"plot"},
    "edgemerge/runtime": {"run"},
    "edgemerge/runtime/evaluation/on_cluster.py": {"cluster", "run"},
    "edgemerge/runtime/serve": {"serve", "sign"},
    "edgemerge/searching": {"run", "search"},
    "tests": {"serve", "test"},
    "tests/runtime/serve/test_web_page.py": {"dev", "serve", "test"},
}
OWN = {"benchmarks", "edgemerge", "kernels", "tests", "tools"}
# The distribution, where several bring a module of its name or none is installed.
DISTRIBUTIONS = {"botocore": "s3fs", "matplotlib": "matplotlib", "ot": "pot", "yaml": "pyyaml"}


def canonical(requirement: str) -> str:
    """The distribution's name in a requirement, as PyPI compares names."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name is not None, requirement
    return re.sub(r"[-_.]+", "-", name.group()).lower()


@cache
def owners() -> Mapping[str, list[str]]:
    """Installed distributions by the modules that they bring; reading them takes half a second."""
    return packages_distributions()


def distributions(module: str) -> set[str]:
    names = [DISTRIBUTIONS[module]] if module in DISTRIBUTIONS else owners().get(module, [module])
    return {canonical(name) for name in names}


def declared(extras: set[str]) -> set[str]:
    lists = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][e] for e in extras)]
    return {canonical(requirement) for part in lists for requirement in part}


def extras_of(file: str) -> set[str]:
    matching = [place for place in EXTRAS if f"{file}/".startswith(f"{place}/")]
    return EXTRAS[max(matching, key=len)] if matching else set()


def imported(path: Path) -> set[str]:
    """Top-level modules that a file imports, wherever in it, but for our own."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).partition(".")[0])
    return found - OWN - sys.stdlib_module_names


FILES = [
    path
    for folder in ("edgemerge", "kernels", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_file_imports_is_declared(path: Path) -> None:
    allowed = declared(extras_of(path.relative_to(ROOT).as_posix()))
    for module in imported(path):
        assert distributions(module) & allowed, f"{module} is not declared"


def test_every_declared_dependency_is_imported() -> None:
    """But for what an extra brings along for llama.cpp's server, which imports it."""
    names = {name for path in FILES for module in imported(path) for name in distributions(module)}
    assert declared({"run", "serve", "plot", "sign", "hub", "search", "cluster", "fleet"}) <= names


def test_a_release_is_listed_with_all_extras() -> None:
    """`run` is in `serve`; `test` and `dev` are no user's."""
    script = (ROOT / "tools" / "sbom").read_text(encoding="utf-8")
    listed = re.search(r"\$\{wheel\}\[([a-z,]+)\]", script)
    assert listed is not None
    extras = set(PROJECT["optional-dependencies"]) - {"run", "test", "dev"}
    assert set(listed[1].split(",")) == extras


def test_the_types_are_the_users_too() -> None:
    """PEP 561: without py.typed a type checker takes nothing from the package."""
    assert (ROOT / "edgemerge" / "py.typed").exists()


def test_every_notice_of_a_licence_is_declared() -> None:
    assert set(PROJECT["license-files"]) == {"LICENSE", "THIRD_PARTY.md"}
    notices = (ROOT / "THIRD_PARTY.md").read_text(encoding="utf-8")
    assert "The ggml authors" in notices
    assert "EleutherAI" in notices
