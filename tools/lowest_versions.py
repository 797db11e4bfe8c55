"""Print, as constraints for pip, the lowest version of every dependency that pyproject.toml allows.

    python -m tools.lowest_versions > lowest.txt
    pip install -c lowest.txt -e '.[serve,test]'

Development tools are left out: they are ours, not the users'.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("run", "serve", "plot", "sign", "hub", "search", "fleet")  # the extras of users


def constraints(pyproject: Path) -> list[str]:
    """NAME==VERSION of dependencies and extras, each once.

    Raises
    ------
    ValueError
        A requirement names no lower bound.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = set()
    for requirement in (*project["dependencies"], *(r for name in NAMES for r in extras[name])):
        found = re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?>=([\w.]+)(?:,.*)?", requirement)
        if found is None:
            raise ValueError(f"pyproject.toml: {requirement} names no lowest version")
        lines.add(f"{found[1]}=={found[2]}")
    return sorted(lines)


if __name__ == "__main__":
    print("\n".join(constraints(ROOT / "pyproject.toml")))
