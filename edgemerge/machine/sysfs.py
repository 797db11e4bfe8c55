"""Reading what the kernel and a board's tools tell; None where they do not."""

from __future__ import annotations

import subprocess
from pathlib import Path

__all__ = ["read_int", "read_text", "run_tool"]


def read_text(path: Path) -> str | None:
    """Contents of a small file without the white space around them; None where it is unreadable."""
    try:
        # device-tree texts end in NUL; a sensor that is switched off fails only here, at the read
        return path.read_bytes().decode("utf-8", errors="replace").strip("\0 \n\t")
    except OSError:
        return None


def read_int(path: Path, base: int = 10) -> int | None:
    """Contents of a file as a number; None where it is unreadable or holds something else."""
    text = read_text(path)
    try:
        return int(text, base) if text else None
    except ValueError:
        return None


def run_tool(root: Path, *command: str) -> str | None:
    """Output of a board's tool in /usr/bin; None where it is missing, fails or takes over 2 seconds.

    Parameters
    ----------
    root : Path
        The file system's root.
    *command : str
        Name of the tool and its arguments.
    """
    program = root / "usr" / "bin" / command[0]
    if not program.is_file():
        return None
    try:
        done = subprocess.run(
            [program, *command[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=2,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
