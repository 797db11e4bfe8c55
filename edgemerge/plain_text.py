"""Text of strangers that people read: nothing in it steers a terminal or turns the order of letters."""

from __future__ import annotations

__all__ = ["plain"]


def plain(text: str) -> str:
    """Put a space for each character that is not printed, such as ESC or a mark of direction."""
    return "".join(c if c.isprintable() else " " for c in text)
