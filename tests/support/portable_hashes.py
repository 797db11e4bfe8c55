"""Hashes of what must be the same bytes on every processor: all codecs, a merge by every method, a transport.

    python -m tests.support.portable_hashes            compare with tests/data/portable_hashes.json
    python -m tests.support.portable_hashes --write    store them, where the codecs give ggml's bytes

tests/test_portable_hashes.py compares them here, `make arm64` on an emulated Arm.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgemerge import merge
from edgemerge.formats.gguf.metadata import encode_value
from edgemerge.formats.gguf.model import GgufModel
from edgemerge.formats.gguf.types import GGML_TYPES
from edgemerge.formats.gguf.writer import make_layout
from edgemerge.formats.quants.codec import CODECS
from edgemerge.formats.quants.weighted import WEIGHTED_SCRATCH, WEIGHTED_TYPES
from edgemerge.merging.precompile import find_missing_of_all
from edgemerge.methods.table import METHODS
from edgemerge.native import KernelFile
from edgemerge.native.store import compile_here
from edgemerge.recipe.recipe import make_recipe
from edgemerge.types import Float32, Setting, TensorSpec, UInt8
from tests.support.places import TESTS
from tests.twins.codecs import hard_rows

STORED = TESTS / "data" / "portable_hashes.json"
N_COLS = 256  # a multiple of every block
N_BLOCKS = 64  # decoded

# Settings that take every kernel a method has; heads are not aligned, which would need SciPy: "transport" has
# the kernels of that.
SETTINGS: dict[str, Setting] = {"density": 0.5, "epsilon": 0.1, "gamma": 0.05, "t": 0.3}
SETTINGS |= {"rescale": True, "weight": 0.7, "select_topk": 0.5}
VARIANTS: dict[str, dict[str, Setting]] = {
    "model_stock:rows": {"filter_wise": True},
    "task_arithmetic:svc": {"svc": True},
    "dare_ties:svc": {"svc": True},
    "hierarchical:svc": {"svc": True},
    "sce:svc": {"svc": True},
    "tsv:svc": {"svc": True},
    "nuslerp:rows": {"nuslerp_flatten": False},
    "nuslerp:columns": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
}

# Kernels that take long to compile come first, so that two processes end at about the same time.
SLOW = ("Q5_K", "Q4_K", "Q2_K", "Q6_K", "Q3_K", "IQ4_XS", "Q4_1", "Q4_0")
CASES = sorted(
    [
        f"{way} {dtype}"
        for dtype, codec in CODECS.items()
        for way in ("decode", "encode")[: 1 + codec.can_encode]
    ]
    + [f"weigh {dtype}" for dtype in WEIGHTED_TYPES]
    + [f"merge {method}" for method in (*METHODS, *VARIANTS)]
    + ["transport sinkhorn"],
    key=lambda case: case.split()[1] not in SLOW,
)


def compute(case: str) -> str:
    """The SHA-256 of one case."""
    what, name = case.split()
    if what == "encode":
        return sha256(encode(name, hard_rows(N_COLS)))
    if what == "weigh":
        return sha256(encode(name, plain_rows(), importances()))
    if what == "decode":
        return sha256(decode(name, stored_bytes(name)))
    if what == "transport":
        return sha256(transport())
    with tempfile.TemporaryDirectory(prefix="edgemerge-") as folder:
        return merge_tiny(name, Path(folder))


def sha256(array: NDArray[np.generic]) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


# -- codecs


def stored_bytes(dtype: str) -> UInt8:
    """Blocks of any bytes whatever."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, N_BLOCKS * CODECS[dtype].block_bytes, dtype=np.uint8)


def plain_rows() -> Float32:
    """Rows as models have them: with importances, wilder ones may overflow into some NaN or other."""
    rng = np.random.default_rng(1)
    whole = rng.integers(-(2**20), 2**20, (N_BLOCKS, N_COLS))
    return whole.astype(np.float32) / np.float32(2**24)


def importances() -> Float32:
    """A few columns matter much, and one not at all."""
    rng = np.random.default_rng(2)
    values = rng.integers(1, 2**10, N_COLS).astype(np.float32) / np.float32(2**10)
    values[::37] *= np.float32(64.0)
    values[5] = 0.0
    return values


def encode(dtype: str, x_f32: Float32, importance_f32: Float32 | None = None) -> UInt8:
    codec = CODECS[dtype]
    out = np.empty(x_f32.size // codec.block_len * codec.block_bytes, np.uint8)
    scratch = np.zeros(max(codec.scratch_len, WEIGHTED_SCRATCH), np.float32)
    codec.encode(x_f32.ravel(), out, scratch, importance_f32)
    return out


def decode(dtype: str, raw_u8: UInt8) -> Float32:
    """The values, with one NaN for all: which one arithmetic gives is the processor's choice."""
    codec = CODECS[dtype]
    out = np.empty(raw_u8.size // codec.block_bytes * codec.block_len, np.float32)
    codec.decode(raw_u8, out)
    return np.where(np.isnan(out), np.float32(np.nan), out)


# -- merges


def merge_tiny(name: str, folder: Path) -> str:
    """Merge two experts of one layer by a method or variant; the hash of the output's tensors."""
    method = name.partition(":")[0]
    row = METHODS[method]
    known = {parameter.name for parameter in row.parameters}
    base, *experts = (write_model(folder / f"{i}.gguf", seed=i) for i in range(3))
    models = [(str(path), None) for path in experts[: row.n_models[1]]]
    parameters = {key: value for key, value in SETTINGS.items() if key in known}
    recipe = make_recipe(
        method,
        models,
        base=str(base) if row.needs_base else None,
        parameters=parameters | VARIANTS.get(name, {}),
        out_type="F32",
        memory=2 << 30,  # an emulator and a compiler are in this process too
        align="off",
    )
    merge(recipe, folder / "out.gguf", threads=1)
    model = GgufModel(folder / "out.gguf")
    digest = hashlib.sha256()
    for tensor, spec in model.specs().items():
        rows = np.empty(spec.nbytes, np.uint8)
        model.read_rows(tensor, 0, spec.n_rows, rows)
        digest.update(f"{tensor} {spec.shape}".encode() + rows.tobytes())
    model.close()
    return digest.hexdigest()


def write_model(path: Path, seed: int) -> Path:
    """Write one layer; its numbers are whole ones over 2^20, so exact wherever they are made."""
    rng = np.random.default_rng(seed)
    shapes = {"attn_norm": (N_COLS,), "attn_q": (48, N_COLS), "ffn_down": (64, N_COLS)}
    tensors = {
        f"blk.0.{stem}.weight": rng.integers(-(2**20), 2**20, shape).astype(np.float32)
        / np.float32(2**20)
        for stem, shape in shapes.items()
    }
    metadata = {
        "general.architecture": encode_value("llama", "str"),
        "llama.block_count": encode_value(1, "u32"),
    }
    specs = [TensorSpec(name, x.shape, "F32", x.nbytes) for name, x in tensors.items()]
    layout = make_layout(metadata, specs)
    with path.open("wb") as file:
        file.write(layout.header)
        for name, x in tensors.items():
            file.seek(layout.offsets[name])
            file.write(x.tobytes())
        file.truncate(layout.n_bytes)
    return path


# -- alignment


def transport() -> NDArray[np.float64]:
    """Sinkhorn's potentials and plan of random costs, whole numbers over 2^20."""
    n, reg, sinkhorn = 32, 1 / 16, KernelFile("sinkhorn")
    cost = np.random.default_rng(3).integers(0, 2**20, n * n) / 2**20
    support = np.arange(0, n * n + 1, n, dtype=np.int32), np.tile(np.arange(n, dtype=np.int32), n)
    duals, plan = np.zeros((2, n)), np.empty(n * n)
    sinkhorn.sweep(cost, *support, reg, 50, np.empty((2, n)), duals)
    sinkhorn.fill_plan(cost, *support, reg, duals, plan)
    return np.concatenate([duals.ravel(), plan])


# -- the command


def load() -> dict[str, str]:
    """Stored hashes by case, and that of what is encoded as "rows"."""
    hashes: dict[str, str] = json.loads(STORED.read_text(encoding="utf-8"))
    return hashes


def check() -> bool:
    """Compute all in two processes, print those that differ; whether none did."""
    stored = load()
    if sha256(hard_rows(N_COLS)) != stored.pop("rows"):
        print("this NumPy makes other rows to encode; hashes of encoders say nothing here")
        return False
    if stored.keys() != set(CASES):
        print(f"other cases than stored: {sorted(stored.keys() ^ set(CASES))}; run --write")
        return False
    started = time.monotonic()
    wrong = 0
    with multiprocessing.get_context("fork").Pool(2) as pool:
        # Kernels are compiled right here: an emulator starts no Python as a child.
        pool.map(compile_here, [[name] for name in find_missing_of_all()[0]], chunksize=1)
        print(f"kernels compiled, {time.monotonic() - started:.0f} s", flush=True)
        for case, seconds, found in pool.imap_unordered(_timed, CASES):
            same = found == stored[case]
            wrong += not same
            print(f"{'' if same else 'DIFFERS '}{case}  {seconds:.1f} s", flush=True)
    print(f"{wrong} of {len(CASES)} hashes differ, {time.monotonic() - started:.0f} s")
    return wrong == 0


def _timed(case: str) -> tuple[str, float, str]:
    started = time.monotonic()
    found = compute(case)
    return case, time.monotonic() - started, found


def write() -> None:
    """Store the hashes of this machine, where every codec gives the bytes of ggml."""
    from tests.support import ggml_oracle

    kinds = {name: kind for kind, name in GGML_TYPES.items()}
    rows = hard_rows(N_COLS)
    for dtype, codec in CODECS.items():
        theirs = ggml_oracle.dequantize(kinds[dtype], stored_bytes(dtype))
        ours = decode(dtype, stored_bytes(dtype))
        assert np.array_equal(ours, theirs, equal_nan=True), f"{dtype} is not decoded as by ggml"
        if codec.can_encode:
            encoded = ggml_oracle.quantize(kinds[dtype], rows)
            assert np.array_equal(encode(dtype, rows), encoded), (
                f"{dtype} is not encoded as by ggml"
            )
        if dtype in WEIGHTED_TYPES:
            encoded = ggml_oracle.quantize(kinds[dtype], plain_rows(), importances())
            ours_encoded = encode(dtype, plain_rows(), importances())
            assert np.array_equal(ours_encoded, encoded), f"{dtype} is not weighed as by ggml"
    hashes = {"rows": sha256(rows)} | {case: compute(case) for case in sorted(CASES)}
    STORED.write_text(json.dumps(hashes, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="store the hashes of this machine")
    if parser.parse_args().write:
        write()
    else:
        sys.exit(0 if check() else 1)
