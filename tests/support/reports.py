"""Reports of devices, as their updates write them."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = ["NOW", "make_report", "write_report"]

NOW = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)


def make_report(device: str, **changes: Any) -> dict[str, Any]:
    """Return a report that is as it should be, with changes."""
    model = {
        "id": "ward-7",
        "file": "ward-7.gguf",
        "sha256": "ab" * 32,
        "bytes": 2_381_824,
        "made": "2026-03-02T02:14:00+00:00",
        "made_of": [{"name": "cardio", "version": "7", "sha256": "cd" * 32, "role": "delta"}],
        "method": "ties",
        "settings": {"density": 0.5},
        "signed_by": "1f2e3d4c",
        "scores": {"disease": {"right": 410, "n": 500}, "substance": {"right": 60, "n": 100}},
        "speed": 12.5,
        "decision": "promoted",
        "reason": "better on disease",
    }
    return {
        "edgemerge_report": 1,
        "device": device,
        "time": "2026-03-02T02:15:00Z",
        "outcome": "promoted",
        "reason": "better on disease",
        "current": model,
        "tried": None,
        "previous": "ward-6",
        "seconds": {"fetch": 3.5, "merge": 8},
        "bytes_fetched": 1_000_000,
        "versions": {"cardio": "7", "neuro": "3"},
        "edgemerge": "0.1.0",
        "failures": [],
    } | changes


def write_report(folder: Path, device: str, **changes: Any) -> Path:
    """Write it where the device would."""
    path = folder / f"{device}.json"
    path.write_text(json.dumps(make_report(device, **changes)))
    return path
