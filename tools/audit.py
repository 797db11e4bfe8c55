"""Ask pip-audit's service for known vulnerabilities in what edgemerge needs to run, as it is installed here.

Ends well where the service cannot be reached or does not know the packages, and says so: a check that
fails without a network is soon left out.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = frozenset({"run", "serve", "plot", "sign", "hub"})
PATIENCE = 120.0  # seconds


def list_needs(name: str, extras: frozenset[str], seen: set[tuple[str, str]]) -> Iterator[str]:
    """Yield what a package needs that is installed, as `NAME==VERSION`, through all levels.

    What an extra asks for and this environment lacks is left out; `seen` keeps it from going round.
    """
    for text in distribution(name).requires or []:
        need = Requirement(text)
        found = canonicalize_name(need.name), ",".join(sorted(need.extras))
        if found in seen or not any(_applies(need, extra) for extra in ("", *extras)):
            continue
        seen.add(found)
        try:
            yield f"{found[0]}=={distribution(need.name).version}"
        except PackageNotFoundError:
            continue
        yield from list_needs(need.name, frozenset(need.extras), seen)


def _applies(need: Requirement, extra: str) -> bool:
    return need.marker is None or need.marker.evaluate({"extra": extra})


def ask(pins: list[str]) -> dict[str, Any] | None:
    """Return pip-audit's answer, or None where there is none."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(pins) + "\n")
        file.flush()
        command = [sys.executable, "-m", "pip_audit", "-r", file.name, "--no-deps", "--disable-pip"]
        command += ["-f", "json", "--progress-spinner", "off", "--timeout", "10"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=PATIENCE, check=False
            )
        except subprocess.TimeoutExpired:
            return None
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        return None
    return answer


def main() -> int:
    """Report; 1 where a package is known to be vulnerable."""
    pins = sorted(set(list_needs("edgemerge", EXTRAS, set())))
    answer = ask(pins)
    if answer is None:
        print("SKIPPED: pip-audit cannot reach its service, or is not installed")
        return 0
    packages = answer["dependencies"]
    known = [package for package in packages if "skip_reason" not in package]
    if not known:
        print(f"SKIPPED: pip-audit's service knows none of the {len(packages)} packages here")
        return 0
    found = [(package, flaw) for package in known for flaw in package["vulns"]]
    for package, flaw in found:
        fixed = ", ".join(flaw["fix_versions"]) or "no version"
        name = f"{package['name']} {package['version']}"
        print(f"{name}: {flaw['id']}, fixed in {fixed}", file=sys.stderr)
    print(f"{len(known)} of {len(packages)} packages audited, {len(found)} vulnerabilities known")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
