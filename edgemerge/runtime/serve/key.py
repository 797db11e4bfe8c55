"""What an API key may consist of."""

from __future__ import annotations

import re

from edgemerge.errors import RecipeError

__all__ = ["check_characters"]


def check_characters(key: str) -> None:
    """See that a key can stand in an HTTP header.

    Raises
    ------
    RecipeError
        It cannot, or it is empty.
    """
    if not re.fullmatch(r"[!-~]+", key):
        raise RecipeError("the API key must be printable ASCII without spaces", field="api_key")
