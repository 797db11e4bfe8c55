"""Check what `tools/wheels` has gathered: every target's list, hashes, tags and bill of materials.

    python -m tools.check_targets FOLDER [BUILDER'S FOLDER ...]

A list has hashes that fit. Its wheels are for its processor and Python. The bill of materials has the same
names, versions and hashes. Each wheel is in a list. The two that are built here have no date of the day and
no path of the builder, so that the same versions give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from packaging.utils import canonicalize_name, parse_wheel_filename

BUILT_HERE = ("edgemerge", "llama-cpp-python")
FIRST_DATE = (1980, 1, 1, 0, 0, 0)
_LINE = re.compile(r"(?P<name>\S+)==(?P<version>\S+) --hash=sha256:(?P<digest>[0-9a-f]{64})")


def main(folder: Path, builders: Sequence[str] = ()) -> int:
    """Print the size of each target, or what is wrong; 0 if nothing is."""
    digests = {
        hashlib.sha256(wheel.read_bytes()).hexdigest(): wheel for wheel in folder.glob("*.whl")
    }
    problems: list[str] = []
    listed: set[Path] = set()
    for target in sorted(folder.glob("*.txt")):
        rows = target.read_text(encoding="utf-8").splitlines()
        wheels = {digests[digest] for row in rows if (digest := row[-64:]) in digests}
        problems += [
            f"{target.name}: {problem}" for problem in list_problems(target, rows, digests)
        ]
        listed |= wheels
        size = sum(wheel.stat().st_size for wheel in wheels) / 1e6
        print(f"{target.stem}: {len(wheels)} wheels, {size:.0f} MB")
    for wheel in sorted(digests.values()):
        if wheel not in listed:
            problems.append(f"{wheel.name}: is in no list")
        if parse_wheel_filename(wheel.name)[0] in BUILT_HERE:
            problems += [f"{wheel.name}: {problem}" for problem in traces(wheel, builders)]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems or not listed else 0


def list_problems(target: Path, rows: Sequence[str], digests: dict[str, Path]) -> Iterator[str]:
    """Say what a list has that the folder, the target or the bill of materials does not."""
    listed = set()
    for row in rows:
        found = _LINE.fullmatch(row)
        if found is None:
            yield f"not a requirement with a hash: {row}"
            continue
        name, version, digest = found.group("name", "version", "digest")
        listed.add((canonicalize_name(name), version, digest))
        if digest not in digests:
            yield f"{name}: no wheel here has its hash"
            continue
        wheel = digests[digest]
        own_name, own_version, _, tags = parse_wheel_filename(wheel.name)
        if (own_name, str(own_version)) != (canonicalize_name(name), version):
            yield f"{name}=={version} has the hash of {wheel.name}"
        if not any(fits(tag.interpreter, tag.abi, tag.platform, target.stem) for tag in tags):
            yield f"{wheel.name} is for another processor or Python"
    bill = json.loads(target.with_suffix(".cdx.json").read_text(encoding="utf-8"))
    parts = {
        (canonicalize_name(part["name"]), part["version"], reference["hashes"][0]["content"])
        for part in bill["components"]
        for reference in part["externalReferences"]
    }
    for name, version, _ in sorted(parts ^ listed):
        yield f"{name}=={version} is in one of list and bill of materials, or with another hash"


def fits(interpreter: str, abi: str, platform: str, target: str) -> bool:
    """Whether a wheel with this tag installs on a target, as aarch64-3.11."""
    machine, _, python = target.rpartition("-")
    minor = int(python.partition(".")[2])
    if platform != "any" and not re.fullmatch(rf"manylinux\w*_{machine}", platform):
        return False
    if interpreter == "py3":
        return abi == "none"
    own = re.fullmatch(r"cp3(\d+)", interpreter)
    if own is None:
        return False
    return int(own[1]) <= minor if abi == "abi3" else int(own[1]) == minor


def traces(wheel: Path, builders: Sequence[str]) -> Iterator[str]:
    """Say what in a wheel tells when or where it was built."""
    with zipfile.ZipFile(wheel) as archive:
        entries = archive.infolist()
        dated = [entry.filename for entry in entries if entry.date_time != FIRST_DATE]
        if dated:
            yield f"{len(dated)} files have dates of their own ({dated[0]})"
        for builder in builders:
            naming = [e.filename for e in entries if builder.encode() in archive.read(e)]
            if naming:
                yield f"{len(naming)} files name {builder} ({naming[0]})"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
