"""Machine code is called with what it was compiled for, and gives what Numba's dispatcher gives."""

from __future__ import annotations

import ast
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemerge.kernels import covariance, della, gram, heads, linear, scalars, sinkhorn, ties
from edgemerge.methods import blocks
from edgemerge.methods import covariance as method
from edgemerge.native import KernelFile, load_kernel
from edgemerge.native.compiler import compile_object
from edgemerge.native.image import BadImage, Image
from edgemerge.native.linker import LinkError, link
from edgemerge.native.signatures import SHARED, SIGNATURES

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
RNG = np.random.default_rng(0)


def public_kernels() -> dict[str, dict[str, int]]:
    """File -> compiled function that others may call -> number of parameters."""
    found: dict[str, dict[str, int]] = {}
    for path in sorted(KERNELS.glob("*.py")):
        if path.stem in SHARED:
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                compiled = any("njit" in ast.unparse(d) for d in node.decorator_list)
                if compiled:
                    found.setdefault(path.stem, {})[node.name] = len(node.args.args)
    return found


def test_every_kernel_has_a_signature() -> None:
    stated = {
        file: {name: len(types.split(", ")) for name, types in kernels.items()}
        for file, kernels in SIGNATURES.items()
    }
    assert stated == public_kernels()


def test_constants_of_kernels_that_size_their_scratch() -> None:
    assert blocks.ELECTION_TILE == ties.TILE
    assert blocks.RANK_BINS == della.RADIX
    assert blocks.SUM_LANES == scalars.LANES
    sizes = (method.TILE, method.ROWS, method.CHUNK)
    assert sizes == (covariance.TILE, covariance.ROWS, covariance.CHUNK)


# -- the same as Numba's dispatcher --------------------------------------------------------------------


def floats(*shape: int, dtype: Any = np.float32) -> Any:
    return RNG.standard_normal(shape).astype(dtype)


CASES: list[tuple[Any, str, list[Any]]] = [
    (
        linear,
        "add_changes",
        [floats(3), 0.7, floats(3, 1000), 0, np.zeros(1, np.int64), floats(1000)],
    ),
    (
        ties,
        "elect",
        [floats(3), floats(3), True, 0.7, floats(3, ties.TILE), floats(3, 5000), floats(5000)],
    ),
    (gram, "row_grams", [floats(3, 600), 100, np.zeros(scalars.LANES), np.zeros((6, 3, 3))]),
    (heads, "squared_distances", [floats(7, 16), floats(5, 16), np.zeros((7, 5))]),
    (
        sinkhorn,
        "fill_plan",
        [
            abs(floats(6, dtype=np.float64)),
            np.array([0, 2, 4, 6], np.int32),
            np.array([0, 1, 1, 2, 0, 2], np.int32),
            0.3,
            floats(2, 3, dtype=np.float64),
            np.zeros(6),
        ],
    ),
]


@pytest.mark.parametrize(("file", "name", "arguments"), CASES, ids=[case[1] for case in CASES])
def test_same_bytes_as_the_dispatcher(file: Any, name: str, arguments: list[Any]) -> None:
    theirs, ours = ([np.copy(a) if np.ndim(a) else a for a in arguments] for _ in range(2))
    getattr(file, name)(*theirs)
    load_kernel(file.__name__.rpartition(".")[2], name)(*ours)
    for a, b in zip(ours, theirs, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_threads_share_a_kernel() -> None:
    add = KernelFile("linear").add_scaled
    results = [np.zeros(4096, np.float32) for _ in range(8)]

    def run(out: Any) -> None:
        for _ in range(200):
            add(np.ones(4096, np.float32), 1.0, out)

    threads = [threading.Thread(target=run, args=(out,)) for out in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((out == 200).all() for out in results)


# -- what is not taken ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(4),
        np.zeros((2, 2), np.float32),
        np.zeros(8, np.float32)[::2],
        np.zeros(4, ">f4"),
        np.frombuffer(bytes(16), np.float32),  # read-only
        np.zeros(17, np.uint8)[1:].view(np.float32),  # unaligned
    ],
    ids=["float64", "matrix", "strided", "big-endian", "read-only", "unaligned"],
)
def test_other_arrays_are_refused(array: Any) -> None:
    """Machine code would read them as something else."""
    with pytest.raises(TypeError, match="contiguous"):
        KernelFile("linear").add_scaled(np.zeros(4, np.float32), 1.0, array)


def test_unknown_kernels_and_argument_counts() -> None:
    with pytest.raises(AttributeError, match="no subtrakt"):
        KernelFile("linear").subtrakt  # noqa: B018
    with pytest.raises(ValueError, match="shorter"):
        KernelFile("linear").subtract(np.zeros(4, np.float32))


def test_without_a_compiler_kernels_are_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    assert KernelFile("linear").subtract is linear.subtract


# -- images and the linker -----------------------------------------------------------------------------

IMAGE = Image(b"code" * 8, 4, ((8, 12),), ((16, "exp"),))


def test_an_image_survives_the_disk() -> None:
    assert Image.from_bytes(IMAGE.to_bytes()) == IMAGE


@given(st.data())
def test_one_flipped_bit_is_seen(data: st.DataObject) -> None:
    raw = bytearray(IMAGE.to_bytes())
    at = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[at // 8] ^= 1 << at % 8
    with pytest.raises(BadImage):
        Image.from_bytes(bytes(raw))


@given(st.binary(max_size=100))
def test_no_image(raw: bytes) -> None:
    with pytest.raises(BadImage):
        Image.from_bytes(raw)


def test_objects_that_are_none() -> None:
    raw, symbol = compile_object("linear", "subtract")
    assert link(raw, symbol).code
    with pytest.raises(LinkError, match="no function"):
        link(raw, "another")
    with pytest.raises(LinkError, match="no ELF64"):
        link(b"\x7fELF\x01" + raw[5:], symbol)
