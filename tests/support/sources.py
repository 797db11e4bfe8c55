"""All tensors of an open model as float32."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgemerge.formats.quants.codec import CODECS
from edgemerge.types import Source

Float32 = NDArray[np.float32]


def read_all(source: Source, step: int = 1 << 20) -> dict[str, Float32]:
    """Every tensor as float32, by GGUF name, `step` rows at a time."""
    found = {}
    for name, spec in source.specs().items():
        values = np.empty(spec.n_elements, np.float32)
        for start in range(0, spec.n_rows, step):
            stop = min(spec.n_rows, start + step)
            raw = np.empty((stop - start) * spec.row_bytes, np.uint8)
            source.read_rows(name, start, stop, raw)
            rows = slice(start * spec.n_cols, stop * spec.n_cols)
            CODECS[spec.dtype].decode(raw, values[rows])
        found[name] = values.reshape(spec.shape)
    return found
