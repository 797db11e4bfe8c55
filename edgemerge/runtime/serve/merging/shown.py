"""What the Models tab tells: what is served, what the folder has, what may be merged, what was done."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from edgemerge.errors import EdgemergeError
from edgemerge.formats.inspection import inspect_model
from edgemerge.provenance.signature import read_signer
from edgemerge.runtime.model_files import open_gguf
from edgemerge.runtime.serve.merging.workshop import Workshop, shown_name
from edgemerge.runtime.serve.models import ModelFile
from edgemerge.runtime.serve.store import ModelStore
from edgemerge.site.record import ModelRecord

__all__ = ["Shown"]

_EVENTS = 40  # of the log, the newest
_LOOKED = 400  # in which a model's latest comparison is looked for


class Shown:
    """Tells all that, with each file's header read once.

    Parameters
    ----------
    models : ModelStore
        What is served.
    checks_signatures : bool
        Whether every model was checked when it was loaded.
    workshop : Workshop or None
        What works on the device's folder, where there is one.
    """

    def __init__(
        self, models: ModelStore, *, checks_signatures: bool, workshop: Workshop | None
    ) -> None:
        self._models = models
        self._checks = checks_signatures
        self._workshop = workshop
        self._known: dict[tuple[Path, int, int], dict[str, Any]] = {}

    async def read(self) -> dict[str, Any]:
        """Tell all of it."""
        states = {state.id: state.state for state in self._models.states()}
        return await asyncio.to_thread(self._read_files, list(self._models), states)

    def _read_files(self, files: list[ModelFile], states: dict[str, str]) -> dict[str, Any]:
        served = [self._serve(file, states[file.name]) for file in files]
        return {"served": served, "site": None if self._workshop is None else self._site()}

    def _serve(self, file: ModelFile, state: str) -> dict[str, Any]:
        workshop = self._workshop
        is_site = workshop is not None and file.name == workshop.name
        return {
            "name": file.name,
            "state": state,
            "is_default": file.name == self._models.default,
            "id": workshop.site.current_id() if workshop is not None and is_site else None,
            **self._look_into(file.path),
        }

    def _look_into(self, path: Path) -> dict[str, Any]:
        """Tell what a file's header says, and who signed it."""
        try:
            facts = path.stat()
            key = (path.resolve(), facts.st_size, facts.st_mtime_ns)
            if key not in self._known:
                self._known[key] = _inspect(key[0])
            signer = read_signer(path)
        except (EdgemergeError, OSError):
            return {"file": path.name, "problem": "the file cannot be read at the moment"}
        signature = None if signer is None else {"key": signer, "is_checked": self._checks}
        return {**self._known[key], "bytes": facts.st_size, "signature": signature}

    def _site(self) -> dict[str, Any]:
        assert self._workshop is not None
        site, names = self._workshop.site, self._workshop.names()
        current = site.current_id()
        compared = _latest_comparisons(site.last_log(_LOOKED))
        return {
            "model": self._workshop.name,
            "current": current,
            "previous": site.previous(),
            "models": [
                _tell(one, compared.get(one.id), is_here=site.has_model(one.id))
                for one in site.records()
            ],
            "names": names,
            "files": [offer.as_json() for offer in self._workshop.offers.read(names)],
            "log": site.last_log(_EVENTS),
        }


def _inspect(path: Path) -> dict[str, Any]:
    with closing(open_gguf(path)) as source:
        found = inspect_model(source)
    made = found.provenance
    return {
        "file": path.name,
        "title": found.name,
        "architecture": found.architecture,
        "file_type": found.file_type,
        "parameters": found.elements,
        "made": made
        and {
            "version": made.version,
            "method": made.method,
            "inputs": [
                {"name": hub or name, "crc32": crc32} for name, crc32, hub in made.inputs_from()
            ],
        },
    }


def _tell(record: ModelRecord, compared: dict[str, Any] | None, *, is_here: bool) -> dict[str, Any]:
    return {
        **record.as_json(),
        "name": shown_name(record),
        "is_here": is_here,
        "compared": compared,
    }


def _latest_comparisons(events: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Find each model's latest comparison, by id."""
    found = (one for one in events if one.get("event") == "compared")
    return {one["id"]: {"with": one.get("with"), "tasks": one.get("tasks")} for one in found}
