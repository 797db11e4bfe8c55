"""Hundreds of deltas in one merge: few descriptors, little memory for each, the same bytes."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from edgemerge.errors import FormatError
from edgemerge.formats import OpenModels
from edgemerge.formats.adapters.reference import AdapterUse, join_reference
from edgemerge.formats.descriptors import READ_FILES
from edgemerge.merging.delta import DeltaSettings, make_delta
from edgemerge.merging.run import merge
from edgemerge.planning.memory import header_bytes
from edgemerge.recipe.recipe import make_recipe
from edgemerge.types import Recipe, Source
from tests.support.small_models import stored, wide_tensors, write_gguf

N = 90


@pytest.fixture(
    scope="module",
    params=[DeltaSettings(bits=1), DeltaSettings(density=0.1), DeltaSettings(rank=2)],
    ids=["bits", "sparse", "rank"],
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and copies of two deltas of one form."""
    folder = tmp_path_factory.mktemp("many")
    base = wide_tensors(0)
    write_gguf(folder / "base.gguf", base)
    for seed in (1, 2):
        expert = write_gguf(folder / f"expert-{seed}.gguf", wide_tensors(seed, base))
        made = folder / f"made-{seed}.gguf"
        make_delta(folder / "base.gguf", expert, made, request.param)
        for i in range(seed, N, 2):
            shutil.copy(made, folder / f"{i:03}.delta.gguf")
    shutil.copy(made, folder / "000.delta.gguf")
    return folder


def recipe_of(folder: Path, n: int, method: str = "task_arithmetic") -> Recipe:
    models = [(str(folder / f"{i:03}.delta.gguf"), None) for i in range(n)]
    return make_recipe(method, models, base=str(folder / "base.gguf"), out_type="F32")


def test_few_descriptors_give_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(recipe_of(folder, N), tmp_path / "all.gguf")
    most = [0]
    monkeypatch.setattr(READ_FILES, "_most", 8)
    before = len(os.listdir("/proc/self/fd"))
    opening = OpenModels.open

    def count(self: OpenModels, path: Path) -> Source:
        found = opening(self, path)
        most[0] = max(most[0], len(os.listdir("/proc/self/fd")) - before)
        return found

    monkeypatch.setattr(OpenModels, "open", count)
    merge(recipe_of(folder, N), tmp_path / "few.gguf")
    assert stored(tmp_path / "few.gguf") == stored(tmp_path / "all.gguf")
    assert most[0] <= 8 + 2  # and the base, and what lists the folder


def test_a_delta_that_was_replaced_meanwhile_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "models"
    shutil.copytree(folder, place)
    monkeypatch.setattr(READ_FILES, "_most", 8)
    with ExitStack() as stack:
        models = open_all(place, 20, stack)
        changed = np.frombuffer((place / "000.delta.gguf").read_bytes(), np.uint8).copy()
        changed[-1] ^= 1
        (place / "000.delta.gguf").unlink()
        changed.tofile(place / "000.delta.gguf")
        spec = models[0].specs()["blk.0.attn_q.weight"]
        raw = np.empty(spec.nbytes, np.uint8)
        models[1].read_rows(spec.name, 0, spec.n_rows, raw)
        with pytest.raises(FormatError, match=r"000\.delta\.gguf: was changed while it was read"):
            models[0].read_rows(spec.name, 0, spec.n_rows, raw)


def open_all(folder: Path, n: int, stack: ExitStack) -> list[Source]:
    models, base = OpenModels(stack), folder / "base.gguf"
    uses = [AdapterUse(folder / f"{i:03}.delta.gguf") for i in range(n)]
    return [models.open(join_reference(base, [use])) for use in uses]


def test_each_delta_takes_little_memory(folder: Path) -> None:
    with ExitStack() as stack:
        models = open_all(folder, N, stack)
        sizes = [header_bytes(models[:n]) for n in (30, 60, 90)]
        assert sizes[2] - sizes[1] == sizes[1] - sizes[0]  # linear
        # Factors are told apart by the object, so that each delta has its own.
        has_factors = bool(getattr(models[0], "_adapters")[0]._factors)  # noqa: B009
        assert (sizes[1] - sizes[0]) / 30 < (80_000 if has_factors else 16_000)
        assert models[0].specs() is models[1].specs()
