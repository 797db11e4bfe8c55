"""What `edgemerge plan` says of models on other machines."""

from __future__ import annotations

from pathlib import Path

from edgemerge.types import Plan

__all__ = ["network_as_json", "network_lines"]


def network_lines(the_plan: Plan, spill: Path | None) -> list[str]:
    """Say what will come over the network, and what is kept of it meanwhile; nothing where all is here."""
    from edgemerge.planning.network import foresee_network
    from edgemerge.sizes import format_size

    found = foresee_network(the_plan)
    if not found.n_models:
        return []
    what = "1 model" if found.n_models == 1 else f"{found.n_models} models"
    if spill is not None:
        kept = f"keeps at most {format_size(found.spill_bytes)} of it in {spill} meanwhile"
        return [f"network: at most {format_size(found.once_bytes)} of {what}; {kept}"]
    lines = [f"network: at most {format_size(found.n_bytes)} of {what}"]
    if found.spill_bytes:
        lines.append(
            f"note: with --spill DIR it is {format_size(found.once_bytes)}, and DIR needs at most "
            f"{format_size(found.spill_bytes)}"
        )
    return lines


def network_as_json(the_plan: Plan, spill: Path | None) -> dict[str, int]:
    """Return the same as numbers."""
    from edgemerge.planning.network import foresee_network

    found = foresee_network(the_plan)
    return {
        "network_bytes": found.n_bytes if spill is None else found.once_bytes,
        "spill_bytes": found.spill_bytes if spill is not None else 0,
    }
