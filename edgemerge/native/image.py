"""A compiled kernel as bytes: machine code that runs wherever it is placed.

An `Image` is what `edgemerge.native.linker` makes of a compiler's object file: code and constants in one
piece, whose references to itself are relative. Left to do where it is placed are a few 8-byte slots, which
take addresses inside the image and of functions of the C library.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
from dataclasses import dataclass
from functools import cache

__all__ = ["BadImage", "Image", "PlacedImage"]

MAGIC = b"edgekrn1"
DIGEST_BYTES = 16
PROT_READ_EXEC = mmap.PROT_READ | mmap.PROT_EXEC

# Numba names a destructor for arrays that it allocated itself; kernels allocate none, so it never runs.
NEVER_CALLED = "NRT_MemInfo_call_dtor"


class BadImage(Exception):
    """These bytes are no image, or were damaged."""


@dataclass(frozen=True, slots=True)
class Image:
    """Machine code of one kernel, position independent but for its slots."""

    code: bytes
    entry: int  # offset of the function
    relative: tuple[
        tuple[int, int], ...
    ]  # slots (offset, target): address of `target` in the image
    imports: tuple[tuple[int, str], ...]  # slots (offset, name): address of a function elsewhere

    def to_bytes(self) -> bytes:
        """Serialise, with a checksum in front."""
        header = json.dumps([self.entry, self.relative, self.imports]).encode()
        body = len(header).to_bytes(4, "little") + header + self.code
        return MAGIC + _digest(body) + body

    @classmethod
    def from_bytes(cls, raw: bytes) -> Image:
        """Read what `to_bytes` wrote.

        Raises
        ------
        BadImage
            The checksum, or the mark in front, is another.
        """
        start = len(MAGIC) + DIGEST_BYTES
        body = raw[start:]
        if raw[: len(MAGIC)] != MAGIC or raw[len(MAGIC) : start] != _digest(body):
            raise BadImage
        n_header = int.from_bytes(body[:4], "little")
        entry, relative, imports = json.loads(body[4 : 4 + n_header])
        return cls(
            body[4 + n_header :],
            entry,
            tuple((at, target) for at, target in relative),
            tuple((at, name) for at, name in imports),
        )


class PlacedImage:
    """An image in executable memory, for as long as this object lives.

    Raises
    ------
    OSError
        The system allows no memory to become executable.
    """

    def __init__(self, image: Image) -> None:
        self._memory = mmap.mmap(-1, len(image.code), prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self._memory[: len(image.code)] = image.code
        hold = ctypes.c_char.from_buffer(self._memory)
        base = ctypes.addressof(hold)
        del hold  # the memory stays: nothing closes it while `self` lives
        for at, target in image.relative:
            self._memory[at : at + 8] = (base + target).to_bytes(8, "little")
        for at, name in image.imports:
            self._memory[at : at + 8] = _address_of(name).to_bytes(8, "little")
        _make_executable(base, len(image.code))
        self.address = base + image.entry


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=DIGEST_BYTES).digest()


@cache
def _libraries() -> tuple[ctypes.CDLL, ...]:
    return ctypes.CDLL(None, use_errno=True), ctypes.CDLL("libm.so.6")


def _address_of(name: str) -> int:
    name = "abort" if name == NEVER_CALLED else name
    for library in _libraries():
        if hasattr(library, name):
            return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
    raise BadImage(name)


def _make_executable(base: int, n_bytes: int) -> None:
    """Give up writing for executing; Linux cleans the instruction cache of pages that become executable."""
    libc = _libraries()[0]
    if libc.mprotect(ctypes.c_void_p(base), ctypes.c_size_t(n_bytes), PROT_READ_EXEC):
        code = ctypes.get_errno()
        raise OSError(code, f"no memory can be made executable here ({os.strerror(code)})")
