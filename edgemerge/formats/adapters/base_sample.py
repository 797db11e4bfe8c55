"""A checksum that tells one base from another, from one row of each tensor.

It is of values, not of stored bytes. So a model has the same checksum as a GGUF and as a directory. A
fine-tune of a base has another one, unless it changed none of these rows. `edgemerge verify --input` reads
all rows.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np
from isal.isal_zlib import crc32

from edgemerge.formats.constants import is_constant
from edgemerge.formats.quants.codec import CODECS
from edgemerge.types import Source

__all__ = ["sample_checksum"]

_known: WeakKeyDictionary[Source, int] = WeakKeyDictionary()  # a base may get hundreds of deltas


def sample_checksum(base: Source) -> int:
    """Return the CRC-32 of the names of all learnt tensors, and of the middle row of each as float32.

    Parameters
    ----------
    base : Source
        Open. Its checksum is kept as long as it is.
    """
    found = _known.get(base)
    if found is None:
        found = _known[base] = _read(base)
    return found


def _read(base: Source) -> int:
    checksum = 0
    for name, spec in sorted(base.specs().items()):
        if is_constant(name) or spec.dtype not in CODECS or not spec.n_elements:
            continue
        raw = np.empty(spec.row_bytes, np.uint8)
        row = spec.n_rows // 2
        base.read_rows(name, row, row + 1, raw)
        values = np.empty(spec.n_cols, np.float32)
        CODECS[spec.dtype].decode(raw, values)
        checksum = crc32(values.view(np.uint8).data, crc32(name.encode(), checksum))
    return checksum
