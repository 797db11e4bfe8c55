"""What a command of this program is told by one that runs it, and says on stderr when it fails."""

from __future__ import annotations

__all__ = ["PROGRESS_FD", "find_complaint"]

PROGRESS_FD = "EDGEMERGE_PROGRESS_FD"  # names the descriptor of `edgemerge.cli.progress_lines`

_MARK = "\nedgemerge: "


def find_complaint(said: str) -> tuple[str, str] | None:
    """Find the sentence with which a command failed, and the lines after it; None where there is none.

    Notes and warnings may stand before it, and what llama.cpp said after it.

    Parameters
    ----------
    said : str
        All that it wrote to stderr.
    """
    _, mark, found = f"\n{said}".rpartition(_MARK)
    sentence, _, detail = found.partition("\n")
    return (sentence, detail) if mark else None
