"""Vectors on their way to a client: float32 as base64, which is one of OpenAI's forms."""

from __future__ import annotations

import base64

import numpy as np
from numpy.typing import NDArray

from edgemerge.types import Float32

__all__ = ["read_vector", "write_vector"]


def write_vector(values: NDArray[np.floating]) -> str:
    """Write numbers as float32, the lowest byte first."""
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def read_vector(text: str) -> Float32:
    """Read what `write_vector` wrote."""
    return np.frombuffer(base64.b64decode(text), "<f4")
