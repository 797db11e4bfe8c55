"""Write what the documentation quotes from the program: help, methods, families, the tree of modules.

    python -m tools.write_docs            rewrite the blocks in docs/ (`make docs`)
    python -m tools.write_docs --check    change nothing; exit 1 where a block is not what it would be

A block stands between `<!-- docs:NAME -->` and `<!-- /docs -->`.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import typer.main

import edgemerge.cli
from edgemerge.cli import make_app
from edgemerge.formats.architectures import FAMILIES
from edgemerge.formats.composite_families import VARIANTS
from edgemerge.formats.hub.families import READERS
from edgemerge.methods.documentation import methods_table, parameters_table
from edgemerge.planning.boards import BOARDS, SOURCES
from edgemerge.sizes import format_size
from tools import scale_model

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"(<!-- docs:(\w+) -->\n).*?(<!-- /docs -->)", re.DOTALL)
# The order of a merge; then what serves the wings, what runs models, and what people see.
WINGS: tuple[str, ...]
WINGS = ("recipe", "methods", "alignment", "planning", "output", "merging", "provenance", "reports")
WINGS += ("formats", "finding", "remote", "cluster", "native", "runtime", "searching", "site")
WINGS += ("fleet", "machine", "cli")


def help_text(command: str) -> str:
    """Return the help of a command, or of the program, as a terminal of 80 columns shows it."""
    from typer.testing import CliRunner

    os.environ["COLUMNS"] = "80"
    words = [*command.split(), "--help"]
    result = CliRunner().invoke(make_app(), words, prog_name="edgemerge")
    return "\n".join(line.rstrip() for line in result.stdout.strip().splitlines())


def command_names() -> list[str]:
    """Return all commands, those of a group after it, as `fleet status`."""
    names = []
    for name, command in typer.main.get_group(make_app()).commands.items():
        names += [name, *(f"{name} {inner}" for inner in getattr(command, "commands", ()))]
    return names


def commands() -> str:
    """Return the help of the program, and a section per command."""
    sections = (f"## {name}\n\n```\n{help_text(name)}\n```\n" for name in command_names())
    return "\n" + "\n".join((f"```\n{help_text('')}\n```\n", *sections)) + "\n"


def exits() -> str:
    """Return a row per exit code, from the docstring of the command line."""
    listed = (edgemerge.cli.__doc__ or "").partition("Exit codes: ")[2]
    rows = (f"| {' | '.join(one.split(' ', 1))} |" for one in _one_line(listed).split("; "))
    return "\n".join(("| code | after |", "| --- | --- |", *rows)) + "\n"


def _one_line(text: str) -> str:
    return " ".join(text.split()).removesuffix(".")


def tree() -> str:
    """Return the tree of packages and modules, with the first line of each docstring."""
    lines = ["edgemerge/"]
    package = ROOT / "edgemerge"
    alone = [p for p in sorted(package.glob("*.py")) if not p.stem.startswith("__")]
    lines += [_entry(path, 1) for path in alone]
    for wing in WINGS:
        lines += _branch(package / wing, 1)
    lines += _branch(ROOT / "kernels", 0)
    return "```\n" + "\n".join(lines) + "\n```\n"


def _branch(folder: Path, depth: int) -> Iterator[str]:
    yield _line(f"{folder.name}/", _about(folder / "__init__.py"), depth)
    for path in sorted(folder.glob("*.py")):
        if path.stem != "__init__":
            yield _entry(path, depth + 1)
    for path in sorted(p.parent for p in folder.glob("*/__init__.py")):
        yield from _branch(path, depth + 1)


def _entry(path: Path, depth: int) -> str:
    return _line(path.name, _about(path), depth)


def _line(name: str, about: str, depth: int) -> str:
    return f"{'  ' * depth + name:<30}  {about}".rstrip()


def _about(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def families() -> str:
    """Return a row per family that is read from a directory."""
    lines = ["| `model_type` | classes | in GGUF | rope scaling |", "| --- | --- | --- | --- |"]
    for model_type, reader in READERS.items():
        classes = ", ".join(f"`{name}`" for name in reader.classes)
        ropes = ", ".join(kind for kind in reader.ropes if kind != "default") or "none"
        known = [FAMILIES[model_type].architecture]
        known += [kind.architecture for name, kind in VARIANTS.items() if _is_of(name, model_type)]
        architectures = ", ".join(dict.fromkeys(known))
        lines.append(f"| `{model_type}` | {classes} | {architectures} | {ropes} |")
    return "\n".join(lines) + "\n"


def _is_of(variant: str, model_type: str) -> bool:
    return variant.startswith(f"{model_type}+")


def boards() -> str:
    """Return a row per board that `plan --board` knows."""
    header = ["`--board`", "board", "cores", "memory", "a core's time", "memory copied"]
    header += ["storage read, written", "from"]
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    for name, rates in BOARDS.items():
        cells = [f"`{name}`", rates.name, str(rates.cores), format_size(rates.memory)]
        cells += [f"{rates.encode:g}x", f"{rates.copied / 1e9:g} GB/s"]
        storage = ", ".join(f"{rate / 1e6:g}" for rate in (rates.read, rates.written) if rate)
        cells += [f"{storage} MB/s", SOURCES[name]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


WRITERS: dict[str, Callable[[], str]] = {
    "boards": boards,
    "commands": commands,
    "exits": exits,
    "families": families,
    "methods": methods_table,
    "parameters": parameters_table,
    "scale": scale_model.report,
    "tree": tree,
}


def rewrite(text: str) -> str:
    """Return a page with its blocks as the program has them now."""
    return BLOCK.sub(lambda found: found[1] + WRITERS[found[2]]() + found[3], text)


def main() -> None:
    checks = sys.argv[1:] == ["--check"]
    stale = []
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if (new := rewrite(text)) != text:
            stale.append(page.name)
            if not checks:
                page.write_text(new, encoding="utf-8")
    if checks and stale:
        sys.exit(f"docs/{', docs/'.join(stale)} do not quote the program; run make docs")


if __name__ == "__main__":
    main()
