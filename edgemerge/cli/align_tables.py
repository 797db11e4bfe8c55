"""What `edgemerge align` shows: a table of layers for people, and a document of JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from edgemerge.alignment.neurons import NeuronPlan
from edgemerge.alignment.records import HeadPlan, Skipped, ValueRotations
from edgemerge.cli.terminal import plain, print_table, span

__all__ = ["Neurons", "Plans", "layer_document", "neuron_document", "print_layers", "print_more"]

MAX_SHOWN = 60  # characters of a permutation in the table

Plans = Sequence[HeadPlan | Skipped]
Neurons = Sequence[NeuronPlan | Skipped]


def print_layers(plans: Plans, names: tuple[str, str]) -> None:
    """Print which head is which, layer by layer."""
    aligned = [plan for plan in plans if isinstance(plan, HeadPlan)]
    grouped = any(len(plan.heads) > len(plan.kv_groups) for plan in aligned)
    what = "group[heads]" if grouped else "heads"
    print(
        f"A is {plain(names[0])}, B is {plain(names[1])}; costs with heads in place and matched: "
        "0 equal, 1 unrelated"
    )
    header = (
        "layer",
        "in place",
        "matched",
        "gap",
        "confidence",
        "by",
        f"B's {what}, in A's order",
    )
    print_table(header, list(_rows(plans)), right="layer confidence")
    if any(_permutation(plan)[1] for plan in aligned):
        print("... is shortened: --json lists all heads")


def _rows(plans: Plans) -> Iterator[tuple[str, ...]]:
    """Write a row per layer, but one for consecutive layers whose heads stay, with their ranges."""
    for (_, said), run in groupby(plans, key=_finding):
        layers = list(run)
        first, last = layers[0].layer, layers[-1].layer
        label = f"{first}" if first == last else f"{first} to {last}"
        aligned = [plan for plan in layers if isinstance(plan, HeadPlan)]
        if not aligned:
            yield (label, "-", "-", "-", "-", "-", said)
            continue
        yield (
            label,
            span([plan.identity_cost for plan in aligned], ".4f"),
            span([plan.cost for plan in aligned], ".4f"),
            span([plan.gap for plan in aligned], ".0e"),
            span([plan.confidence for plan in aligned], ".3f"),
            _solver(aligned[0]),
            said,
        )


def _finding(plan: HeadPlan | Skipped) -> tuple[str, str]:
    """Tell what two layers must have in common to be shown in one row."""
    if isinstance(plan, Skipped):
        return "", f"skipped: {plain(plan.reason)}"
    alone = "" if plan.is_identity else str(plan.layer)
    return f"{_solver(plan)}{alone}", _permutation(plan)[0]


def _solver(plan: HeadPlan) -> str:
    return "exact solver" if plan.exact else "sinkhorn" if plan.converged else "sinkhorn, rough"


def _permutation(plan: HeadPlan) -> tuple[str, bool]:
    """Write a permutation for people, and tell whether it was too long for that.

    Heads in brackets belong to one KV group; groups are named where there is more than one head in each.
    """
    if plan.guarded:
        return "in place (reordering gains too little)", False
    if plan.is_identity:
        return "in place", False
    per_group = len(plan.heads) // len(plan.kv_groups)
    if per_group == 1:
        return _shorten(" ".join(map(str, plan.heads)))
    groups = []
    for i, group in enumerate(plan.kv_groups):
        heads = plan.heads[i * per_group : (i + 1) * per_group]
        groups.append(f"{group}[{' '.join(map(str, heads))}]")
    return _shorten(" ".join(groups))


def _shorten(text: str) -> tuple[str, bool]:
    if len(text) <= MAX_SHOWN:
        return text, False
    return text[: text.rindex(" ", 0, MAX_SHOWN - 3)] + " ...", True


def print_more(plans: Plans, neurons: Neurons) -> None:
    """Print what rotating values gains, and what matching neurons gains."""
    values = {plan.layer: plan.values for plan in plans if isinstance(plan, HeadPlan)}
    rows, reasons = [], set()
    for matched in neurons:
        turn = values.get(matched.layer)
        cells = [str(matched.layer), "-", "-", "-", "-"]
        if isinstance(turn, ValueRotations):
            cells[1:3] = f"{turn.identity_cost:.4f}", f"{turn.cost:.4f}"
        if isinstance(matched, NeuronPlan):
            cells[3:] = f"{matched.identity_cost:.4f}", f"{matched.cost:.4f}"
        skipped = {"values": turn, "neurons": matched}
        reasons |= {
            f"{what} stay: {plain(part.reason)}"
            for what, part in skipped.items()
            if isinstance(part, Skipped)
        }
        rows.append(tuple(cells))
    header = ("layer", "values in place", "rotated", "neurons in place", "matched")
    print_table(header, rows, right="layer")
    for reason in sorted(reasons):
        print(reason)


def layer_document(plan: HeadPlan | Skipped) -> dict[str, Any]:
    """Return what is known of the heads of a layer, in terms of JSON."""
    if isinstance(plan, Skipped):
        return {"layer": plan.layer, "skipped": plan.reason}
    document = {
        "layer": plan.layer,
        "identity_cost": plan.identity_cost,
        "cost": plan.cost,
        "gap": plan.gap,
        "confidence": plan.confidence,
        "iterations": plan.iterations,
        "converged": bool(plan.converged),
        "exact": bool(plan.exact),
        "guarded": bool(plan.guarded),
        "is_identity": plan.is_identity,
        "kv_groups": list(plan.kv_groups),
        "heads": list(plan.heads),
    }
    if isinstance(plan.values, ValueRotations):
        document["values"] = {
            "identity_cost": plan.values.identity_cost,
            "cost": plan.values.cost,
            "is_identity": plan.values.matrices is None,
        }
    elif plan.values is not None:
        document["values"] = {"skipped": plan.values.reason}
    return document


def neuron_document(plan: NeuronPlan | Skipped) -> dict[str, Any]:
    """Return what is known of the neurons of a layer, in terms of JSON."""
    if isinstance(plan, Skipped):
        return {"layer": plan.layer, "skipped": plan.reason}
    return {
        "layer": plan.layer,
        "identity_cost": plan.identity_cost,
        "cost": plan.cost,
        "is_identity": bool(np.array_equal(plan.order, np.arange(len(plan.order)))),
        "order": plan.order.tolist(),
    }
