"""Bounds of what one request may take."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one request.

    Attributes
    ----------
    body : int
        Bytes of JSON.
    max_tokens, default_tokens : int
        Tokens that one answer may have, and has where the request leaves it open.
    request_seconds : float
        From a request's turn to its end.
    read_seconds, send_seconds : float
        For the client to send its request, and to take each piece of the answer.
    """

    body: int = 1 << 20
    max_tokens: int = 4096
    default_tokens: int = 512
    request_seconds: float = 600.0
    read_seconds: float = 20.0
    send_seconds: float = 30.0

    def tokens(self, wanted: int | None) -> int:
        """Tokens that an answer may have, of those that a request wants."""
        return min(self.default_tokens if wanted is None else wanted, self.max_tokens)
