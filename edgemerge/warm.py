"""Compiling kernels in a process of their own, once, so that the compiler's memory is never a merge's.

LLVM needs about 100 MB more than the code it makes, and the code is cached on disk: a merge that finds
its kernels compiled keeps a smaller budget than one that compiles. So before Numba is imported, `warm_up`
looks for a stamp beside Numba's cache for every kernel the plan will use; where one is missing, a child
process merges a few zeros by the same method and types, which compiles exactly what is needed.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path

from edgemerge.formats.ggml_types import row_bytes
from edgemerge.formats.gguf_writer import make_layout
from edgemerge.formats.metadata import encode_value
from edgemerge.methods import METHODS
from edgemerge.types import Plan, TensorSpec

__all__ = ["warm_up"]

CHILD = "EDGEMERGE_WARMING"  # set in the child, which must not ask for a child itself
SHAPE = (256, 256)  # a multiple of every block, and of the heads of the tiny model
N_HEADS = 4


def warm_up(the_plan: Plan) -> None:
    """Make sure that the kernels of a plan are compiled; does nothing where they are.

    A child that fails is no error: the merge then compiles in its own process.
    """
    if os.environ.get(CHILD):
        return
    stamps = [_stamp(need) for need in _needs(the_plan)]
    if all(stamp.exists() for stamp in stamps):
        return
    request = [the_plan.recipe.method, str(the_plan.align), *_joined_types(the_plan)]
    done = subprocess.run(
        [sys.executable, "-m", "edgemerge.warm", *request],
        env={**os.environ, CHILD: "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    if done.returncode == 0:
        for stamp in stamps:
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.touch()


def _joined_types(the_plan: Plan) -> tuple[str, str]:
    """Types that are read, and types that are written."""
    jobs = [job for job in the_plan.jobs if not job.is_byte_copy]
    read = {tensor.spec.dtype for job in jobs for tensor in job.inputs}
    return ",".join(sorted(read)), ",".join(sorted({job.out.dtype for job in jobs}))


def _needs(the_plan: Plan) -> list[str]:
    read, written = _joined_types(the_plan)
    return [
        f"method-{the_plan.recipe.method}",
        f"align-{the_plan.align}",
        *(f"decode-{dtype}" for dtype in read.split(",") if dtype),
        *(f"encode-{dtype}" for dtype in written.split(",") if dtype),
    ]


def _stamp(need: str) -> Path:
    """Where the proof lies that something was compiled: beside the code, and gone with it."""
    return _cache_folder() / f"edgemerge-{_fingerprint()}-{need}.warm"


def _cache_folder() -> Path:
    """Folder of Numba's cache: as set, else beside the kernels, else the user's."""
    if chosen := os.environ.get("NUMBA_CACHE_DIR"):
        return Path(chosen)
    beside = _kernels() / "__pycache__"
    if os.access(beside if beside.exists() else beside.parent, os.W_OK):
        return beside
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgemerge"


def _kernels() -> Path:
    return (Path(__file__).parent / "kernels").resolve()


@cache
def _fingerprint() -> str:
    """What Numba's cache depends on: the kernels, the compiler, Python, the processor."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(_kernels().glob("*.py")):
        digest.update(path.read_bytes())
    digest.update(f"{version('numba')} {version('llvmlite')} {sys.version}".encode())
    digest.update(_processor_features())
    return digest.hexdigest()


def _processor_features() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return b""
    return next((line for line in lines if line.lower().startswith((b"flags", b"features"))), b"")


# -- the child ------------------------------------------------------------------------------------


def _merge_zeros(method: str, align: str, read: Iterable[str], written: Iterable[str]) -> None:
    """Merge tiny models of zeros: one tensor per type that is written, read in every type."""
    from edgemerge.merge import merge
    from edgemerge.recipe import make_recipe

    row = METHODS[method]
    read, written = list(read), list(written)
    parameters = {"density": 0.5, "epsilon": 0.1, "t": 0.5}
    used = {k: v for k, v in parameters.items() if k in {**row.model_parameters, **row.global_parameters}}
    with tempfile.TemporaryDirectory(prefix="edgemerge-") as name:
        folder = Path(name)
        # The base has what is written, so that `keep` writes it; the experts take turns through the rest.
        base = _write_zeros(folder / "base.gguf", written)
        n_experts = 1 if row.n_models[1] == 1 else 2
        for turn in range(0, max(1, len(read)), n_experts):
            experts = [
                _write_zeros(folder / f"{i}.gguf", [read[(turn + i) % len(read)]] * len(written))
                for i in range(n_experts)
            ]
            recipe = make_recipe(
                method,
                [(str(path), None) for path in experts],
                base=str(base) if row.needs_base else None,
                parameters=used,
                out_type="keep",
                align=None if align == "None" else align,
            )
            merge(recipe, folder / "out.gguf", force=True)


def _write_zeros(path: Path, dtypes: Iterable[str]) -> Path:
    """Write a GGUF of one layer, with attention and one more tensor per type."""
    dtypes = list(dtypes)
    stems = ["attn_q", "attn_k", "attn_v", "attn_output"]
    specs = [
        TensorSpec(f"blk.0.{stem}.weight", SHAPE, dtype, SHAPE[0] * row_bytes(dtype, SHAPE[1]))
        for stem, dtype in zip(
            [*stems, *(f"ffn_{i}" for i in range(len(dtypes)))], [dtypes[0]] * 4 + dtypes, strict=True
        )
    ]
    metadata = {
        "general.architecture": encode_value("llama", "str"),
        "llama.block_count": encode_value(1, "u32"),
        "llama.attention.head_count": encode_value(N_HEADS, "u32"),
        "llama.attention.head_count_kv": encode_value(N_HEADS, "u32"),
    }
    layout = make_layout(metadata, specs)
    with path.open("wb") as file:
        file.write(layout.header)
        file.truncate(layout.n_bytes)
    return path


if __name__ == "__main__":
    _merge_zeros(sys.argv[1], sys.argv[2], *(arg.split(",") for arg in sys.argv[3:5]))
