"""The name of an image's file: after all that decides its code but processor and compiler."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from edgemerge.native.signatures import SHARED, SIGNATURES

__all__ = ["KERNELS", "image_name"]

HERE = Path(__file__).parent
KERNELS = (HERE.parent / "kernels").resolve()


def image_name(file: str, name: str) -> str:
    """Name the file of a kernel's image; `file` and `name` as in `SIGNATURES`."""
    return f"{file}.{name}-{_source_hash(file)}.image"


@cache
def _source_hash(file: str) -> str:
    digest = hashlib.blake2b(digest_size=8)
    sources = (
        KERNELS / f"{file}.py",
        *(KERNELS / f"{shared}.py" for shared in SHARED),
        HERE / "compiler.py",
        HERE / "linker.py",
    )
    for path in sources:
        digest.update(path.read_bytes())
    digest.update(repr(SIGNATURES[file]).encode())
    return digest.hexdigest()
