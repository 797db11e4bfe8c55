"""Two orders of the rows of queries and keys: that of Hugging Face's files, and GGUF's.

GGUF's item 2 i + p of a head is stored as item p hd/2 + i, where hd is the length of a head and p is 0 or 1.
An item is a row of a matrix, or an element of a bias. So each head is two runs in the file, one per parity p,
whose items go to every other place of GGUF's order.
"""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["rotary_runs"]


def rotary_runs(start: int, stop: int, head_dim: int) -> Iterator[tuple[int, range]]:
    """Yield runs that lie together in a Hugging Face file.

    Parameters
    ----------
    start, stop : int
        A range of items in GGUF's order.
    head_dim : int
        Items of one head; even.

    Yields
    ------
    first : int
        Number of the run's first item in the file.
    places : range
        Where its items are in GGUF's order, counted from `start`.

    Examples
    --------
    Two heads of four items: of the items 1 to 5, those numbered 2, 1, 3 and 4 come one after the other.

    >>> [(first, list(places)) for first, places in rotary_runs(1, 5, 4)]
    [(1, [1]), (2, [0, 2]), (4, [3])]
    """
    half = head_dim // 2
    for head in range(start // head_dim, (stop - 1) // head_dim + 1):
        first = head * head_dim
        for parity in (0, 1):
            i_from = max(0, (start - first - parity + 1) // 2)
            i_to = min(half, (stop - first - parity + 1) // 2)
            if i_from < i_to:
                at = first + parity - start
                yield (
                    first + parity * half + i_from,
                    range(at + 2 * i_from, at + 2 * i_to, 2),
                )
