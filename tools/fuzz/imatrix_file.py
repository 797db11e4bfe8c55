"""An importance matrix, in either of its forms: its header, and every importance."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgemerge.formats.quants.imatrix import ImportanceMatrix

__all__ = ["read_imatrix"]


def read_imatrix(data: bytes, folder: Path) -> None:
    """Read an input as an importance matrix, whole, and see that it gives numbers to weigh by."""
    path = folder / "imatrix"
    path.write_bytes(data)
    matrix = ImportanceMatrix(path)
    try:
        for name, n_values in matrix.sizes.items():
            values = np.empty(n_values, np.float32)
            matrix.read(name, 0, values)
            assert np.isfinite(values).all()
            assert (values >= 0).all()
    finally:
        matrix.close()
