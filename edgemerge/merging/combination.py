"""One adapter of several, without a base: the combinations of peft's `add_weighted_adapter`."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from edgemerge.budget import floor_bytes
from edgemerge.errors import BudgetError, FormatError, MismatchError, RecipeError
from edgemerge.formats.adapters.layout import ExtractedTensor
from edgemerge.formats.adapters.pairs import AdapterPairs, Pair
from edgemerge.merging.adapter_files import output_paths, write_peft
from edgemerge.merging.adapter_parts import AdapterPart, Spool
from edgemerge.merging.elections import KINDS, Rule, merge_rows
from edgemerge.merging.extraction import check_adapter_output
from edgemerge.merging.low_rank import factorise, need_bytes
from edgemerge.merging.matrices import BESIDE
from edgemerge.native import KernelFile
from edgemerge.native.store import compile_missing
from edgemerge.planning.differences import PIECE
from edgemerge.planning.plan import DEFAULT_MEMORY
from edgemerge.sizes import format_size
from edgemerge.types import Float32, Progress

__all__ = ["COMBINATIONS", "OF_CHANGES", "Combination", "combine"]

OF_CHANGES = {"svd": "linear"} | {f"{kind}_svd": kind for kind in KINDS[1:]}
COMBINATIONS = ("cat", *KINDS, *OF_CHANGES)
SUMS = 4096  # of the kernel
MIB = 1 << 20

lora = KernelFile("lora")


@dataclass(frozen=True, slots=True)
class Combination:
    """What was combined."""

    output: Path
    out_bytes: int
    modules: int
    ranks: tuple[int, int]  # lowest and highest
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Use:
    """One adapter's factors of a module, and its weight."""

    number: int
    path: Path
    pair: Pair
    weight: float

    @property
    def factor(self) -> float:
        """What the product of its factors is multiplied by."""
        return self.weight * self.pair.scale


def combine(
    adapters: Sequence[tuple[Path, float]],
    output: str | os.PathLike[str],
    *,
    how: str = "cat",
    density: float | None = None,
    rank: int | None = None,
    by_count: bool = False,
    seed: int = 0,
    dtype: str = "F32",
    memory: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Combination:
    """Make one adapter of several.

    Parameters
    ----------
    adapters : sequence of (path, weight)
        PEFT directories that have factors only.
    output : path
        A directory for PEFT.
    how : str
        One of `COMBINATIONS`, as peft's `combination_type`. `cat` and `svd` keep the weighted sum of the
        changes. Those without svd combine all A and all B by themselves, those with svd the changes.
    density : float, optional
        Part of the elements that ties, dare and magnitude_prune keep.
    rank : int, optional
        Of the result of svd; by default the highest of a module's.
    by_count : bool
        Elect signs by count, instead of by sum (peft's `majority_sign_method="frequency"`).
    seed : int
        Of dare.
    dtype : str
        F32 or F16, of the factors.
    memory, force, progress
        As of `edgemerge.merging.extraction.extract`; progress counts modules.

    Raises
    ------
    RecipeError, MismatchError, FormatError, BudgetError, OutputError
        See `edgemerge.errors`; nothing has been written.
    """
    path, floor = Path(output), floor_bytes()
    rule = _read_rule(how, density, by_count=by_count)
    if rank is not None and how not in OF_CHANGES:
        raise RecipeError(
            f"{how} has no rank to choose; leave out --rank, or use svd or one that ends in _svd",
            field="rank",
        )
    for adapter, weight in adapters:
        if not math.isfinite(weight):
            raise RecipeError(
                f"the weight of {adapter} is {weight}; give a finite number", field="weight"
            )
    if path.suffix == ".gguf":
        raise RecipeError(
            "a combination is a PEFT directory; give a folder, and make a GGUF adapter by extract",
            field="output",
        )
    inputs = tuple(adapter for adapter, _ in adapters)
    check = partial(check_adapter_output, path, inputs, force=force)
    check()
    with ExitStack() as stack:
        opened = [stack.enter_context(closing(AdapterPairs(adapter))) for adapter, _ in adapters]
        weights = [weight for _, weight in adapters]
        modules = dict.fromkeys(module for one in opened for module in one.pairs)
        uses = {module: _uses(module, opened, weights) for module in modules}
        _check_budget(uses.values(), how, rank, floor, memory)
        compile_missing({"lora.add_product", "dare.drop_random"})
        spool = Spool(stack.enter_context(tempfile.TemporaryFile(dir=path.absolute().parent)), path)
        parts, ranks = list[AdapterPart](), dict[str, int]()
        for i, (module, using) in enumerate(uses.items()):
            a, b = _combine(module, using, how, rule, rank, seed)
            pair = using[0].pair
            ranks[pair.module] = len(a)
            for name, values in zip(pair.names, (a, b), strict=True):
                make = partial(spool.read, spool.add(values), values.shape)
                parts.append(AdapterPart(ExtractedTensor(name, values.shape, dtype), (make,)))
            if progress is not None:
                progress(i + 1, len(uses))
        for one in opened:
            one.check_unchanged()
        config = json.dumps(opened[0].combined_config(ranks), indent=2) + "\n"
        write_peft(path, parts, config.encode(), check)
        bases = dict.fromkeys(one.config.base_name for one in opened)
    notes = []
    if len(bases) > 1:
        notes.append(f"the adapters name different models: {', '.join(map(str, bases))}")
    return Combination(
        output=path,
        out_bytes=sum(one.stat().st_size for one in output_paths(path)),
        modules=len(ranks),
        ranks=(min(ranks.values()), max(ranks.values())),
        notes=tuple(notes),
    )


def _read_rule(how: str, density: float | None, *, by_count: bool) -> Rule:
    if how not in COMBINATIONS:
        raise RecipeError(
            f"unknown combination {how[:40]!r}; known are {', '.join(COMBINATIONS)}", field="how"
        )
    kind = OF_CHANGES.get(how, "linear" if how == "cat" else how)
    if by_count and not kind.endswith("ties"):
        raise RecipeError(
            f"{how} elects no signs; leave out --by-count, or use ties or dare_ties",
            field="by_count",
        )
    if kind == "linear":
        if density is not None:
            raise RecipeError(
                f"{how} keeps all elements; leave out --density, or use ties, dare or prune",
                field="density",
            )
        return Rule(kind)
    if density is None:
        raise RecipeError(
            f"{how} needs the part of the elements that is kept, from 0 to 1; give it with --density",
            field="density",
        )
    if not 0.0 <= density <= 1.0:
        raise RecipeError(f"the density is {density}; give a number from 0 to 1", field="density")
    if not density and kind.startswith("dare"):
        raise RecipeError(
            f"{how} divides what it keeps by the density, which is 0; give one above 0",
            field="density",
        )
    return Rule(kind, density, by_count)


def _uses(module: str, adapters: Sequence[AdapterPairs], weights: Sequence[float]) -> list[_Use]:
    """List the adapters that have a module; all must be of one shape."""
    found: list[_Use] = []
    for i, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        pair = adapter.pairs.get(module)
        if pair is None:
            continue
        found.append(_Use(i, adapter.path, pair, weight))
        first = found[0].pair
        ours = pair.b.shape[0], pair.a.shape[1]
        theirs = first.b.shape[0], first.a.shape[1]
        if ours != theirs:
            raise MismatchError(
                f"the change of {module!r} is {list(theirs)} in {adapters[found[0].number].path} and "
                f"{list(ours)} in {adapter.path}; only adapters of one model can be combined",
                tensor=module,
                shapes=(theirs, ours),
            )
    return found


def _check_budget(
    modules: Iterable[list[_Use]],
    how: str,
    rank: int | None,
    floor: int,
    memory: int | None,
) -> None:
    """Refuse a budget that does not hold the largest module.

    Raises
    ------
    BudgetError
        It does not.
    """
    needs = [0]
    for uses in modules:
        m, n = uses[0].pair.b.shape[0], uses[0].pair.a.shape[1]
        ranks = [use.pair.rank for use in uses]
        need = 16 * sum(ranks) * (m + n)
        if how in OF_CHANGES:
            need += need_bytes((m, n), rank or max(ranks)) + (len(uses) + 6) * 4 * max(PIECE, n)
        needs.append(need)
    budget, need = memory or DEFAULT_MEMORY, floor + max(needs) + BESIDE
    if need > budget:
        raise BudgetError(
            f"a budget of {format_size(budget)} is too small for these adapters; the smallest that works "
            f"is --memory {-(-need // MIB)}MiB",
            needed=need,
            budget=budget,
        )


def _combine(
    module: str, uses: Sequence[_Use], how: str, rule: Rule, rank: int | None, seed: int
) -> tuple[Float32, Float32]:
    """Return A and B of one module."""
    keys = [_key(module, use.number, seed) for use in uses]
    if how in OF_CHANGES:
        return _reduce(module, uses, rule, rank, keys)
    all_a = [use.pair.a.read((0, use.pair.rank), (0, use.pair.a.shape[1])) for use in uses]
    all_b = [use.pair.b.read((0, use.pair.b.shape[0]), (0, use.pair.rank)) for use in uses]
    if how == "cat":
        with np.errstate(over="ignore"):  # what overflows is refused where it is written
            scaled = [a * np.float32(use.factor) for a, use in zip(all_a, uses, strict=True)]
        return np.concatenate(scaled), np.concatenate(all_b, axis=1)
    if len({use.pair.rank for use in uses}) > 1:
        raise MismatchError(
            f"the adapters have different ranks in {module!r}, and {how} adds factors by their place; use "
            "cat, or a combination with svd",
            tensor=module,
        )
    roots = [math.sqrt(abs(use.factor)) for use in uses]
    signed = [math.copysign(root, use.factor) for root, use in zip(roots, uses, strict=True)]
    a = _whole(all_a, rule, signed, keys)
    return a, _whole(all_b, rule, roots, [key ^ 1 for key in keys])


def _whole(
    tensors: Sequence[Float32], rule: Rule, weights: Sequence[float], keys: Sequence[int]
) -> Float32:
    """Make one matrix of several, which are small."""

    def rows() -> Iterator[tuple[int, list[Float32]]]:
        yield 0, [tensor.copy() for tensor in tensors]

    shape = tensors[0].shape[0], tensors[0].shape[1]
    ((_, found),) = merge_rows(rows, rule, weights, shape, keys)()
    return found


def _reduce(
    module: str, uses: Sequence[_Use], rule: Rule, rank: int | None, keys: Sequence[int]
) -> tuple[Float32, Float32]:
    """Combine the changes, row by row, and find factors of the result."""
    shape = uses[0].pair.b.shape[0], uses[0].pair.a.shape[1]
    rights = [use.pair.a.read((0, use.pair.rank), (0, shape[1])) for use in uses]
    sums = np.empty(SUMS, np.float32)

    def rows() -> Iterator[tuple[int, list[Float32]]]:
        height = max(1, PIECE // shape[1])
        for start in range(0, shape[0], height):
            stop = min(shape[0], start + height)
            tensors = []
            for use, right in zip(uses, rights, strict=True):
                left = use.pair.b.read((start, stop), (0, use.pair.rank))
                change = np.zeros((stop - start, shape[1]), np.float32)
                lora.add_product(left, right, use.pair.scale, sums, change)
                if not np.isfinite(change).all():
                    raise FormatError(
                        "has factors whose product float32 cannot hold; leave this adapter out, or get "
                        "it again",
                        path=use.path,
                        tensor=module,
                    )
                tensors.append(change)
            yield start, tensors

    weights = [use.weight for use in uses]
    blocks: Callable[[], Iterator[tuple[int, Float32]]]
    blocks = merge_rows(rows, rule, weights, shape, keys)
    wanted = rank or max(use.pair.rank for use in uses)
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # it is refused below
            found = factorise(blocks, shape, rank=wanted, energy=None, seed=_key(module, 0, 0))
    except OverflowError as error:
        largest = max(uses, key=lambda use: abs(use.weight))
        raise MismatchError(
            f"the change of {module!r} is larger than float32 can hold; give smaller weights, as to "
            f"{largest.path}",
            tensor=module,
        ) from error
    if found is None:
        return np.zeros((1, shape[1]), np.float32), np.zeros((shape[0], 1), np.float32)
    return found.right, found.left


def _key(module: str, number: int, seed: int) -> int:
    digest = hashlib.blake2b(f"{seed}|{number}|{module}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
