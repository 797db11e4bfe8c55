"""Importance matrices as they are written, read back by gguf-py and by what reads those of llama-imatrix."""

from __future__ import annotations

import struct
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest

from edgemerge.errors import OutputError
from edgemerge.formats.quants.imatrix import ImportanceMatrix
from edgemerge.output.file import check_output
from edgemerge.output.importance_file import Squares, write_importances

TEXT = Path("folder/a text.txt")


def squares() -> dict[str, Squares]:
    """A stack of three experts, the second of which was never chosen, and a matrix."""
    rng = np.random.default_rng(0)
    sums = rng.random((3, 8)).astype(np.float32)
    sums[1] = 0
    return {
        "blk.0.ffn_up_exps.weight": Squares(sums, np.array([100, 0, 29])),
        "blk.0.attn_q.weight": Squares(rng.random((1, 12)).astype(np.float32), np.array([64])),
    }


def test_the_gguf_form_is_that_of_llama_imatrix(tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    n_bytes = write_importances(path, squares(), dataset=TEXT, n_ctx=32)
    assert n_bytes == path.stat().st_size
    reader = gguf.GGUFReader(path)
    keys = [key for key in reader.fields if not key.startswith("GGUF.")]
    assert {key: reader.fields[key].contents() for key in keys} == {
        "general.type": "imatrix",
        "imatrix.datasets": [str(TEXT)],
        "imatrix.chunk_count": 3,
        "imatrix.chunk_size": 32,
    }
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    assert list(found) == [  # as sorted names
        "blk.0.attn_q.weight.in_sum2",
        "blk.0.attn_q.weight.counts",
        "blk.0.ffn_up_exps.weight.in_sum2",
        "blk.0.ffn_up_exps.weight.counts",
    ]
    for name, entry in squares().items():
        assert np.array_equal(found[f"{name}.in_sum2"], entry.sums.squeeze())
        assert found[f"{name}.counts"].ravel().tolist() == entry.counts.tolist()
    # One row is a vector to ggml, which leaves out outer axes of length 1.
    assert [found[name].ndim for name in found] == [1, 1, 2, 2]


@pytest.mark.parametrize("name", ["i.gguf", "i.dat"])
def test_both_forms_are_read_back(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    write_importances(path, squares(), dataset=TEXT, n_ctx=32)
    matrix = ImportanceMatrix(path)
    assert (matrix.dataset, matrix.n_chunks) == (str(TEXT), 3)
    for tensor, entry in squares().items():
        out = np.empty(entry.sums.size, np.float32)
        matrix.read(tensor, 0, out)
        seen = np.maximum(entry.counts, 1)[:, None]
        wanted = np.where(entry.counts[:, None] > 0, entry.sums / seen, 1)
        assert np.allclose(out, wanted.ravel(), rtol=3e-7, atol=0)
    matrix.close()


def test_the_old_form_leaves_out_what_was_never_seen(tmp_path: Path) -> None:
    unseen = {"blk.1.ffn_up.weight": Squares(np.zeros((2, 4), np.float32), np.zeros(2, np.int64))}
    write_importances(tmp_path / "i.dat", {**squares(), **unseen}, dataset=TEXT, n_ctx=32)
    raw = (tmp_path / "i.dat").read_bytes()
    assert struct.unpack_from("<i", raw) == (2,)
    assert b"blk.1" not in raw
    assert raw.endswith(struct.pack("<ii", 3, len(str(TEXT))) + str(TEXT).encode())


def test_several_matrices_may_have_one_count(tmp_path: Path) -> None:
    """A stack that every token passes through: one row of sums in the file, as llama-imatrix has it."""
    sums = np.arange(1, 9, dtype=np.float32).reshape(2, 4)
    one = {"blk.0.attn_k_b.weight": Squares(sums, np.array([16]))}
    write_importances(tmp_path / "i.gguf", one, dataset=TEXT, n_ctx=16)
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "i.gguf").tensors}
    assert np.array_equal(found["blk.0.attn_k_b.weight.in_sum2"].ravel(), sums.ravel())
    matrix = ImportanceMatrix(tmp_path / "i.gguf")
    out = np.empty(4, np.float32)
    matrix.read("blk.0.attn_k_b.weight", 4, out)
    assert np.array_equal(out, sums[1] / 16)
    matrix.close()


@pytest.mark.parametrize("name", ["i.gguf", "i.dat"])
def test_a_file_that_came_during_the_work_stays(name: str, tmp_path: Path) -> None:
    """Fault: it was replaced without --force."""
    (tmp_path / name).write_bytes(b"precious")
    check = partial(check_output, tmp_path / name, (), force=False)
    with pytest.raises(OutputError, match="exists already"):
        write_importances(tmp_path / name, squares(), dataset=TEXT, n_ctx=32, check=check)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [(name, b"precious")]


@pytest.mark.parametrize("name", ["i.gguf", "i.dat"])
def test_what_cannot_be_written_is_told(name: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        write_importances(tmp_path / "absent" / name, squares(), dataset=TEXT, n_ctx=32)
