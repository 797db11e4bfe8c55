"""Check the file list of a built wheel: the packages of the tree and their notices, nothing else.

The kernels live in `kernels/` and are imported as `edgemerge.kernels`; a packaging slip would
install them as a top-level `kernels`, a name that belongs to somebody else on PyPI.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LICENSES = ("LICENSE", "THIRD_PARTY.md")


def expected_files() -> set[str]:
    """Files that the wheel has to hold, code and the server's page, by their path inside it."""
    own = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "edgemerge").rglob("*")
        if path.is_file() and not {"kernels", "__pycache__"} & set(path.parts)
    }
    return own | {f"edgemerge/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}


def main(wheel: str) -> int:
    """Compare one wheel with the tree; 0 if they agree."""
    with zipfile.ZipFile(wheel) as archive:
        everything = set(archive.namelist())
    names = {name for name in everything if ".dist-info/" not in name}
    notices = {name.partition(".dist-info/licenses/")[2] for name in everything}
    problems = [f"missing: the notice {name}" for name in LICENSES if name not in notices]
    problems += [f"missing: {name}" for name in sorted(expected_files() - names)]
    problems += [f"not expected: {n}" for n in sorted(names) if not n.startswith("edgemerge/")]
    for problem in problems:
        print(f"{wheel}: {problem}", file=sys.stderr)
    if not problems:
        print(
            f"{Path(wheel).name}: {len(names)} files, as in the tree, and {len(LICENSES)} notices"
        )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
