"""One LoRA adapter of many clients' adapters: what the strategy for Flower does, without Flower.

Arrays have the names of PEFT's state dict, as `base_model.model.….q_proj.lora_A.weight`.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgemerge.errors import RecipeError
from edgemerge.formats.adapters.layout import ExtractedTensor
from edgemerge.formats.adapters.pairs import AdapterPairs
from edgemerge.merging.adapter_files import write_peft
from edgemerge.merging.adapter_parts import AdapterPart
from edgemerge.merging.combination import OF_CHANGES, combine
from edgemerge.types import Float32

__all__ = ["Arrays", "aggregate", "find_fault", "peft_config"]

Arrays = Mapping[str, Float32]

LARGEST = 1e9  # norm of an array: sums of products of two are far from float32's end


def peft_config(rank: int, alpha: int, modules: Sequence[str]) -> dict[str, Any]:
    """Return adapter_config.json of the clients' adapters; `modules` as PEFT's `target_modules`."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(modules),
        "bias": "none",
    }


def find_fault(update: Arrays, sent: Arrays, count: object) -> str | None:
    """Say why a client's arrays, of so many examples, cannot be merged; None where they can."""
    if not isinstance(count, int | float) or not 1 <= count < math.inf:
        return f"was trained on {count!r} examples"
    if update.keys() != sent.keys():
        return "has other arrays than were sent"
    for name, values in update.items():
        if values.shape != sent[name].shape:
            return f"has {name} of {list(values.shape)}, not {list(sent[name].shape)}"
        if values.dtype != np.float32:
            return f"has {name} as {values.dtype}, not float32"
        if not np.isfinite(values).all():
            return f"has numbers in {name} that are not finite"
        if np.linalg.norm(values.astype(np.float64)) > LARGEST:
            return f"has numbers in {name} that are too large"
    return None


def aggregate(
    updates: Sequence[Arrays],
    counts: Sequence[int],
    sent: Arrays,
    config: Mapping[str, Any],
    *,
    how: str = "svd",
    density: float | None = None,
    seed: int = 0,
    memory: int | None = None,
) -> dict[str, Float32]:
    """Merge adapters by `edgemerge combine`, and return one of the same names and shapes.

    Parameters
    ----------
    updates : sequence of mappings of str to float32 arrays
        A client's factors: A (rank, n_in) and B (n_out, rank).
    counts : sequence of int
        Examples that each was trained on: the weight of its change.
    sent : mapping of str to float32 arrays
        What all of them began with.
    config : mapping
        From `peft_config`.
    how, density, seed, memory
        As of `edgemerge.merging.combination.combine`, which has to be one with svd: the changes B A are
        combined, and the result has the clients' rank.

    Raises
    ------
    EdgemergeError
        The adapters cannot be merged, or not in the budget.
    """
    if how not in OF_CHANGES:
        raise RecipeError(
            f"{how} does not combine the changes themselves; give one of {', '.join(OF_CHANGES)}",
            field="how",
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [_write(folder / f"client-{i}", one, config) for i, one in enumerate(updates)]
        combine(
            list(zip(paths, _weights(counts, how), strict=True)),
            folder / "merged",
            how=how,
            density=density,
            rank=int(config["r"]),
            seed=seed,
            memory=memory,
        )
        return _read(folder / "merged", sent, config)


def _weights(counts: Sequence[int], how: str) -> list[float]:
    """Weigh by examples. Ties divides by the number of those that agree; so its weights are 1 in the mean."""
    total = sum(counts)
    mean = len(counts) if "ties" in how else 1
    return [mean * count / total for count in counts]


def _write(folder: Path, arrays: Arrays, config: Mapping[str, Any]) -> Path:
    parts = [
        AdapterPart(ExtractedTensor(name, values.shape, "F32"), (partial(np.asarray, values),))
        for name, values in arrays.items()
    ]
    write_peft(folder, parts, json.dumps(dict(config)).encode())
    return folder


def _read(folder: Path, sent: Arrays, config: Mapping[str, Any]) -> dict[str, Float32]:
    """Read factors whose product has the scale of the clients' adapters; a combination's is 1.

    Where it has a lower rank than they, A has further rows of what was sent, and B zeros beside them. So
    clients can learn by these; with both zero, no gradient would ever reach them.
    """
    scale = np.float32(config["lora_alpha"] / config["r"])
    arrays = {}
    with closing(AdapterPairs(folder)) as merged:
        for pair in merged.pairs.values():
            (name_a, name_b), rank = pair.names, pair.rank
            a = pair.a.read((0, rank), (0, pair.a.shape[1]))
            b = pair.b.read((0, pair.b.shape[0]), (0, rank))
            if not a.any():  # nothing changed
                rank = 0
            arrays[name_a] = np.concatenate([a[:rank], sent[name_a][rank:]])
            arrays[name_b] = np.zeros_like(sent[name_b])
            arrays[name_b][:, :rank] = b[:, :rank] / scale
    return arrays
