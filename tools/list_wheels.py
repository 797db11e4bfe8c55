"""Print requirements with hashes for the wheels in a folder: what pip installs from it, and nothing else.

python -m tools.list_wheels FOLDER
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path


def requirements(folder: Path) -> list[str]:
    """One line for each wheel in a folder, as pip's --require-hashes reads them."""
    lines = []
    for wheel in sorted(folder.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        lines.append(f"{name.replace('_', '-').lower()}=={version} --hash=sha256:{digest}")
    return lines


if __name__ == "__main__":
    print("\n".join(requirements(Path(sys.argv[1]))))
