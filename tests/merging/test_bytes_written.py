"""A merge writes its output once: cards wear by what is written, and are slow at it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from edgemerge.merging.run import merge
from edgemerge.recipe.recipe import make_recipe
from tests.support.small_models import write_gguf

BESIDE = 1 << 18  # bytes of the journal and of cached modules
# The kernel counts what it has to write in folios of up to 2 MiB, again where a part of one is written later.
FOLIOS = 8 << 20


def written() -> tuple[int, int]:
    """Bytes that this process has written, and that it made the kernel write to storage (proc_pid_io(5))."""
    text = Path("/proc/self/io").read_text()
    counts = {name: int(n) for name, n in re.findall(r"^(\w+): (\d+)$", text, re.M)}
    return counts["wchar"], counts["write_bytes"] - counts["cancelled_write_bytes"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, None]]:
    """Two models of 32 MiB in F32."""
    folder, paths = tmp_path_factory.mktemp("models"), []
    shapes = {"token_embd": (4096, 512), "output": (4096, 512)}
    shapes |= {f"blk.{i}.ffn_up": (2048, 512) for i in range(4)}
    for seed in range(2):
        rng = np.random.default_rng(seed)
        tensors = {
            f"{name}.weight": rng.standard_normal(shape, np.float32)
            for name, shape in shapes.items()
        }
        paths.append((str(write_gguf(folder / f"{seed}.gguf", tensors, n_layers=4)), None))
    return paths


@pytest.mark.parametrize(
    ("out_type", "split"),
    [("F32", None), ("F16", None), ("Q8_0", None), ("Q4_K_M", None), ("F16", 8 << 20)],
)
def test_every_byte_is_written_once(
    out_type: str, split: int | None, models: list[tuple[str, None]], tmp_path: Path
) -> None:
    recipe = make_recipe("linear", models, out_type=out_type)
    before = written()
    merge(recipe, tmp_path / "out.gguf", threads=2, split_bytes=split)
    asked, stored = (now - earlier for now, earlier in zip(written(), before, strict=True))
    made = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert made <= asked <= made + BESIDE
    assert stored <= 1.05 * made + FOLIOS  # nothing, where the temporary folder is in memory
