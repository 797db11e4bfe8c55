"""What a server tells the Models tab: two models of a folder, one of them compared, and files to merge."""

from __future__ import annotations

from typing import Any

from edgemerge.runtime.serve.merging.choices import describe_methods

__all__ = ["NEW", "OLD", "PLAN", "admin_answers", "file", "job", "models_document"]

OLD, NEW = "a" * 16, "b" * 16
TASK = {
    "task": "disease",
    "n": 200,
    "right": [90, 110],
    "only": [10, 30],
    "difference": 0.1,
    "low": 0.04,
    "high": 0.16,
    "p": 0.0022,
}
WORSE = TASK | {"task": "general", "difference": -0.1, "low": -0.16, "high": -0.04, "p": 0.0001}
UNSURE = TASK | {"task": "dose", "low": 0.003, "high": 0.2, "p": 0.065}


def record(number: str, name: str, **more: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {
        "id": number,
        "name": name,
        "bytes": 90 << 20,
        "made": "2026-11-29T12:00:00Z",
        "made_of": [{"name": "base", "role": "base"}, {"name": "ward a", "role": "expert"}],
        "method": "ties",
        "settings": {"type": "Q4_K_M"},
        "signed_by": None,
        "scores": {},
        "decision": None,
        "reason": "",
        "is_here": True,
        "compared": None,
    }
    return usual | more


def file(name: str, kind: str = "model", **more: Any) -> dict[str, Any]:
    return {"key": f"0/{name}", "name": name, "kind": kind, "bytes": 90 << 20, "base": "", **more}


def models_document() -> dict[str, Any]:
    served = {
        "name": "ward",
        "state": "loaded",
        "is_default": True,
        "id": OLD,
        "file": f"{OLD}.gguf",
        "title": "ward",
        "architecture": "llama",
        "file_type": "Q4_K_M",
        "parameters": 135_000_000,
        "made": {"version": "0.1.0", "method": "ties", "inputs": [{"name": "base", "crc32": "0"}]},
        "bytes": 90 << 20,
        "signature": {"key": "4fd1" * 8, "is_checked": True},
    }
    models = [
        record(NEW, "Second", compared={"with": OLD, "tasks": [TASK, WORSE, UNSURE]}),
        record(
            OLD,
            "First",
            decision="promoted",
            reason="chosen on the page",
            signed_by="the clinic",
            scores={"disease": {"right": 90, "n": 200}},
        ),
        record("c" * 16, "Refused", decision="refused", is_here=False),
    ]
    site = {
        "model": "ward",
        "current": OLD,
        "previous": NEW,
        "models": models,
        "names": {OLD: "First", NEW: "Second"},
        "files": [
            file("base"),
            file("ward a"),
            file("ward b", "delta", base="base"),
            *(file("disease", "questions"), file("general", "questions")),
        ],
        "log": [
            {"time": "2026-11-29T12:00:00Z", "event": "merged", "id": OLD, "name": "First"},
            {"time": "2026-11-29T12:01:00Z", "event": "promoted", "id": OLD, "reason": "because"},
        ],
    }
    return {"has_key": True, "served": [served], "site": site, "job": None}


PLAN = {
    "file_type": "Q4_K_M",
    "tensors": 200,
    "elements": 1,
    "read_bytes": 3 << 30,
    "written_bytes": 90 << 20,
    "passes": 2,
    "needed_bytes": 100 << 20,
    "budget_bytes": 512 << 20,
    "notes": ["the tokenizer is the base's"],
    "free_bytes": 7 << 30,
    "seconds": 150,
    "basis": "method",
}


def job(**more: Any) -> dict[str, Any]:
    usual = {"id": 3, "kind": "merge", "title": "Third", "state": "running", "sentence": ""}
    usual |= {"stage": "ties -> Third.gguf", "unit": None, "result": None, "seconds": 12.0}
    return usual | {"done": 1 << 29, "total": 1 << 31} | more


def admin_answers() -> dict[str, Any]:
    """What the routes answer while nothing is at work, by path."""
    return {
        "/admin/models": models_document(),
        "/admin/methods": describe_methods(),
        "/admin/job": {"job": None},
        "/admin/plan": PLAN,
    }
