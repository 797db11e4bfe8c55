"""What can be wrong with a GGUF header, one thing at a time, beside the files of data/hostile."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from edgemerge.errors import FormatError
from edgemerge.formats import open_model
from edgemerge.formats.gguf.model import GgufModel
from tests.support.bounded import bounded

F32, Q4_0, BOOL, U32, STRING, ARRAY = 0, 2, 7, 4, 8, 9
U64_MAX = (1 << 64) - 1


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def pair(key: bytes, value: bytes) -> bytes:
    """A key with a value that begins with its type."""
    return text(key) + value


def tensor(
    name: bytes = b"t", shape: tuple[int, ...] = (32,), kind: int = F32, offset: int = 0
) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


LLAMA = pair(b"general.architecture", struct.pack("<I", STRING) + text(b"llama"))


def gguf(
    pairs: bytes = b"",
    n_pairs: int = 0,
    tensors: tuple[bytes, ...] = (tensor(),),
    version: int = 3,
    n_data: int = 128,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A file with these keys, beside the architecture, and these tensors."""
    n_tensors, n_all = counts or (len(tensors), n_pairs + 1)
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_all) + LLAMA + pairs
    head += b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(n_data)


def aligned(value: int) -> bytes:
    return pair(b"general.alignment", struct.pack("<II", U32, value))


REFUSED = {
    "short": (b"GG", "is not a GGUF file"),
    "cut in the counts": (b"GGUF\x03\0\0\0\1", "is cut off inside its header"),
    "version 4": (gguf(version=4), "is GGUF version 4"),
    "counts that wrap": (gguf(counts=(U64_MAX // 24, 1)), "more than its"),
    "keys that wrap": (gguf(counts=(1, U64_MAX // 12)), "more than its"),
    "duplicate key": (gguf(LLAMA, 1), "has the key 'general.architecture' twice"),
    "key of 65536 bytes": (
        gguf(pair(b"k" * 65536, struct.pack("<II", U32, 1)), 1),
        "has a key of 65536 bytes",
    ),
    "NUL in a key": (gguf(pair(b"a\0b", struct.pack("<II", U32, 1)), 1), "with a NUL byte"),
    "array of 2^61": (
        gguf(pair(b"k", struct.pack("<IIQ", ARRAY, U32, 1 << 61)), 1),
        "is cut off inside its header",
    ),
    "strings of 2^61": (
        gguf(pair(b"k", struct.pack("<IIQ", ARRAY, STRING, 1 << 61)), 1),
        "more than the file can hold",
    ),
    "string in an array": (
        gguf(pair(b"k", struct.pack("<IIQQ", ARRAY, STRING, 1, 1 << 63)), 1),
        "a string longer than the file",
    ),
    "array in an array": (
        gguf(pair(b"k", struct.pack("<IIQ", ARRAY, ARRAY, 1)), 1),
        "an array of arrays",
    ),
    "bool 7": (gguf(pair(b"k", struct.pack("<IB", BOOL, 7)), 1), "is a bool of value 7"),
    "alignment 13": (gguf(aligned(13), 1), "not a power of two"),
    "alignment of 2^17": (gguf(aligned(1 << 17), 1), "not a power of two up to 65536"),
    "name of 64 bytes": (gguf(tensors=(tensor(b"n" * 64),)), "has a tensor name of 64 bytes"),
    "name without letters": (gguf(tensors=(tensor(b""),)), "has a tensor name of 0 bytes"),
    "NUL in a name": (gguf(tensors=(tensor(b"a\0b"),)), "a tensor name with a NUL byte"),
    "name that is not UTF-8": (gguf(tensors=(tensor(b"\xff"),)), "that is not UTF-8"),
    "no dimension": (gguf(tensors=(tensor(shape=()),)), "has 0 dimensions"),
    "bytes that wrap": (gguf(tensors=(tensor(shape=(1 << 62,)),)), "past the end of the file"),
    "elements that wrap": (
        gguf(tensors=(tensor(shape=(1 << 31, 1 << 31, 4)),)),
        "has the impossible shape",
    ),
    "partial block": (gguf(tensors=(tensor(shape=(33,), kind=Q4_0),)), "do not fill"),
    "offset that wraps": (
        gguf(tensors=(tensor(offset=U64_MAX - 31),)),
        "an overlap, a gap or bad alignment",
    ),
    "gap": (
        gguf(tensors=(tensor(), tensor(b"u", offset=160)), n_data=320),
        "lies at offset 160 where 128 was expected",
    ),
    "data cut off": (gguf(n_data=127), "ends 1 bytes past the end of the file"),
    "web page": (b"<!DOCTYPE html><html>", "is a web page"),
    "PyTorch zip": (b"PK\x03\x04" + bytes(90), "is a PyTorch zip"),
    "pickle": (b"\x80\x02}q\0" + bytes(90), "is a Python pickle"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "is not a GGUF file"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_each_has_its_own_word(tmp_path: Path, what: str) -> None:
    raw, words = REFUSED[what]
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)

    def refused() -> None:
        with pytest.raises(FormatError) as caught:
            open_model(path)
        assert words in str(caught.value)
        assert str(caught.value).isprintable()

    bounded(refused)


def test_what_they_are_made_from_is_fine(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    two = (tensor(), tensor(b"../u", offset=128))
    path.write_bytes(gguf(aligned(32), 1, two, n_data=256))
    model = GgufModel(path)
    assert list(model.specs()) == ["t", "../u"]
    model.close()


def test_a_tensor_without_elements_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(tensors=(tensor(shape=(0, 4)), tensor(b"u"))))
    model = GgufModel(path)
    assert model.specs()["t"].nbytes == 0
    out = np.empty(128, np.uint8)
    model.read_rows("u", 0, 1, out)
    model.close()


def test_what_is_no_file_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    for path in (tmp_path / "pipe.gguf", tmp_path):
        with pytest.raises(FormatError, match="is not a regular file"):
            GgufModel(path)
