"""Importance matrices as llama-imatrix writes them, and files that only look like them."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from edgemerge.errors import FormatError
from edgemerge.formats.quants.imatrix import ImportanceMatrix
from tests.support.imatrix_files import random_sums, write_gguf, write_old

SUMS = random_sums({"blk.0.ffn_up.weight": (4, 32), "blk.0.ffn_down_exps.weight": (3, 4, 64)})


@pytest.mark.parametrize("write", [write_old, write_gguf])
def test_values_are_what_llama_quantize_takes(tmp_path: Path, write: Callable[..., dict]) -> None:
    path = tmp_path / "imatrix"
    expected = write(path, SUMS)
    importance = ImportanceMatrix(path)
    assert importance.sizes == {name: values.size for name, values in SUMS.items()}
    assert (importance.dataset, importance.n_chunks) == ("wiki.txt", 7)
    assert importance.crc32 == zlib.crc32(path.read_bytes())
    for name, values in expected.items():
        out = np.empty(values.size, np.float32)
        importance.read(name, 0, out)
        assert (out == values).all()
        part = np.empty(20, np.float32)
        importance.read(name, values.size - 20, part)
        assert (part == values[-20:]).all()
    importance.close()


def test_an_expert_that_saw_nothing_has_even_importances(tmp_path: Path) -> None:
    counts = {name: np.full(len(values), 3, np.float32) for name, values in SUMS.items()}
    name = "blk.0.ffn_down_exps.weight"
    counts[name][1] = 0
    expected = write_gguf(tmp_path / "i.gguf", SUMS, counts)
    importance = ImportanceMatrix(tmp_path / "i.gguf")
    out = np.empty(64, np.float32)
    importance.read(name, 64, out)
    assert (out == 1).all()
    importance.read(name, 128, out)
    assert (out == expected[name][128:]).all()
    importance.close()


def test_the_old_form_without_counts_and_without_a_trailer(tmp_path: Path) -> None:
    write_old(tmp_path / "i.dat", SUMS, n_calls=0, trailer=b"")
    importance = ImportanceMatrix(tmp_path / "i.dat")
    assert (importance.dataset, importance.n_chunks) == ("", 0)
    out = np.empty(32, np.float32)
    importance.read("blk.0.ffn_up.weight", 0, out)
    assert (out == SUMS["blk.0.ffn_up.weight"]).all()
    importance.close()


def old(*parts: bytes | int) -> bytes:
    return b"".join(struct.pack("<i", p) if isinstance(p, int) else p for p in parts)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer"),
        (
            old(-1) + bytes(100),
            r"not a llama-imatrix file \(it begins with .*\); give what llama-imatrix wrote",
        ),
        (old(1 << 30) + bytes(100), "not a llama-imatrix file"),
        (old(1, -5) + bytes(100), "a name of -5 bytes"),
        (old(1, 1 << 30) + bytes(100), "a name of 1073741824 bytes"),
        (old(1, 64, b"a" * 64, 1, 1) + bytes(4), "a name of 64 bytes"),
        (old(1 << 17) + bytes(17 << 17), "claims 131072 tensors"),
        (old(1, 3, b"a\0b", 1, 1) + bytes(4), "a name of 3 bytes"),
        (old(1, 2, b"\xff\xfe", 1, 1) + bytes(4), "not UTF-8"),
        (old(1, 1, b"a", 1, 0) + bytes(4), "claims 0 values"),
        (old(1, 1, b"a", 1, -1) + bytes(4), "claims -1 values"),
        (old(1, 1, b"a", 1, 9) + bytes(4), "claims 9 values"),
        (old(2, 1, b"a", 1, 1) + bytes(40), "a name of 0 bytes"),
        (old(2, 1, b"a", 1, 1) + bytes(4) + old(1, b"a", 1, 1) + bytes(4), "twice"),
        (old(1, 1, b"a", 1, 1) + np.float32(np.nan).tobytes(), "the importance nan"),
        (old(1, 1, b"a", 1, 1) + np.float32(-1).tobytes(), "the importance -1"),
        (old(1, 1, b"a", 1, 1) + np.float32(np.inf).tobytes(), "the importance inf"),
        (old(1, 1, b"a", 1, 1) + np.float32(1e21).tobytes(), "the importance 1e"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message) as caught:
        ImportanceMatrix(path)
    assert caught.value.path == path


@pytest.mark.parametrize("write", [write_old, write_gguf])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, write: Callable[..., dict]) -> None:
    path = tmp_path / "i"
    write(path, random_sums({"a.weight": (1, 4), "b.weight": (2, 1, 4)}))
    whole = path.read_bytes()
    end = len(whole) - 16 if write is write_old else len(whole)  # the trailer need not be there
    for n_bytes in range(end):
        path.write_bytes(whole[:n_bytes])
        if not whole[n_bytes:].strip(b"\0"):
            continue  # only padding is lost
        with pytest.raises(FormatError):
            ImportanceMatrix(path)


@pytest.mark.parametrize(
    ("sums", "counts", "message"),
    [
        ({"a": np.ones((3, 4))}, {"a": np.full(3, np.nan)}, "no number from 0 on"),
        ({"a": np.ones((3, 4))}, {"a": np.full(3, -1.0)}, "no number from 0 on"),
        ({"a": np.ones((3, 4))}, {"a": np.ones(5)}, "12 sums for 5 counts"),
        ({"a": np.full((3, 4), -1.0)}, {"a": np.ones(3)}, "the importance -1"),
        ({"a": np.ones(1 << 21)}, {"a": np.ones(1 << 21)}, "has 2097152 counts, the most are"),
    ],
)
def test_gguf_files_that_make_no_sense_are_refused(
    tmp_path: Path, sums: dict, counts: dict, message: str
) -> None:
    path = tmp_path / "i.gguf"
    writer = gguf.GGUFWriter(path, "")
    writer.add_array("imatrix.datasets", ["x"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    writer.add_tensor("a.in_sum2", sums["a"].astype(np.float32))
    writer.add_tensor("a.counts", counts["a"].astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FormatError, match=message):
        ImportanceMatrix(path)


def test_what_is_no_file_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(FormatError, match="is not a regular file"):
            ImportanceMatrix(path)


def test_a_model_is_no_importance_matrix(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("a.weight", np.ones((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FormatError, match=r"no imatrix\.datasets, so it is no importance matrix"):
        ImportanceMatrix(path)
    with pytest.raises(FormatError, match="cannot be read"):
        ImportanceMatrix(tmp_path / "absent")
