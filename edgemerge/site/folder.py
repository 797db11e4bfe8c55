"""The folder of a device: its models, which of them is current, and what was done.

::

    current.gguf        a relative link to the model that serves; the one thing that decides which it is
    models/ID.gguf      a model; ID is the first 16 hexadecimal digits of its SHA-256
    models/ID.json      its record (`edgemerge.site.record.ModelRecord`); a refused model has only this
    history             ids in the order of their promotion, one a line
    log.jsonl           all that was done and why (`edgemerge.site.log`)
    trying.json         what is being done now, so that the next start goes on with it
    settled.json        what the last update came to, and the digest of all that decided it
    inputs/, work/      fetched files; files in the making
    answers/            what models answered to the questions, so that each is asked once
    registry/           what was seen of the registry, so that it cannot be set back
    hashes.json         of the files that the site names, so that each is read once
    lock                locked by the process that changes the folder
    .edgemerge-folder   says that the folder is a device's (`edgemerge.site.ownership`)

Power may go at any moment. A file is written beside its name and renamed, then the folder is synced. The link
is switched by one rename. `history` is written before the link is: its entries after the current model are of
a promotion that did not happen, or of one that was taken back, and count for nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgemerge.errors import FormatError, OutputError, RecipeError
from edgemerge.finding.json_objects import parse_object
from edgemerge.formats.json_file import read_object
from edgemerge.output.file import finishing, sync_folder, write_file
from edgemerge.site import ownership
from edgemerge.site.lock import lock_folder
from edgemerge.site.log import append_event, last_events
from edgemerge.site.record import ModelRecord, read_record, record_of_file

__all__ = ["SiteFolder"]

RECENT = 50  # lines of the log among which the last switch is looked for


class SiteFolder:
    """The folder of a device.

    Reading needs no lock, and sees a whole state at any moment. Changes are made under `locked`.

    Parameters
    ----------
    path : Path
        The folder. It need not exist before `make`.

    Attributes
    ----------
    path, current_path, models, inputs, work, answers, registry, hashes : Path
        The folder, the link to the model that serves, and the folders in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.current_path = path / ownership.CURRENT
        self.models, self.inputs, self.work, self.answers = (
            path / name for name in ownership.CLEARED
        )
        self.registry, self.hashes = path / "registry", path / "hashes.json"
        self._history, self._log = path / "history", path / "log.jsonl"
        self._trying, self._settled = path / "trying.json", path / "settled.json"

    def make(self) -> None:
        """Make the folder and those in it, where they are missing.

        Raises
        ------
        OutputError
            They cannot be made, or something of somebody else lies there.
        """
        ownership.check_free(self.path)
        try:
            for folder in (self.path, self.models, self.inputs, self.work, self.answers):
                folder.mkdir(exist_ok=True, parents=folder is self.path)
        except OSError as error:
            raise OutputError(
                f"cannot be made ({error.strerror}); name a folder on a disk that can be written to",
                path=self.path,
            ) from error
        ownership.mark_own(self.path)

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Be the one process that changes the folder; see `edgemerge.site.lock.lock_folder`."""
        return lock_folder(self.path)

    # -- models ------------------------------------------------------------------------------------

    def current(self) -> ModelRecord | None:
        """Return the record of the model that serves, None before the first promotion.

        Raises
        ------
        FormatError
            Its record is missing or damaged.
        """
        name = self.current_id()
        return None if name is None else self.record(name)

    def current_id(self) -> str | None:
        """Return the id of the model that serves, None before the first promotion."""
        try:
            return Path(os.readlink(self.current_path)).stem
        except OSError:
            return None

    def is_lost(self) -> bool:
        """Tell whether the file of the model that serves is gone, as where a file system was repaired."""
        name = self.current_id()
        return name is not None and not self.has_model(name)

    def serving_id(self) -> str | None:
        """Return the id of the model that serves; None where its file was lost, too."""
        return None if self.is_lost() else self.current_id()

    def records(self) -> list[ModelRecord]:
        """Return the records of all models, the newest first; one that a bad card damaged is left out."""
        found = []
        for path in self.models.glob("*.json"):
            with contextlib.suppress(FormatError):
                found.append(self.record(path.stem))
        return sorted(found, key=lambda one: (one.made, one.id), reverse=True)

    def record(self, name: str) -> ModelRecord:
        """Return the record of a model by its id.

        Raises
        ------
        FormatError
            It is missing or damaged.
        """
        path = self.models / f"{name}.json"
        return read_record(read_object(path), path)

    def model_path(self, name: str) -> Path:
        """Return where the model of an id lies."""
        return self.models / f"{name}.gguf"

    def has_model(self, name: str) -> bool:
        """Tell whether the file of an id is here; a refused model's is not."""
        return self.model_path(name).is_file()

    def write_record(self, record: ModelRecord) -> None:
        """Write a model's record, and replace one that is there."""
        _write_json(self.models / f"{record.id}.json", record.as_json())

    def add(self, file: Path, record: ModelRecord) -> None:
        """Take a finished file, on the same disk and synced, as the model of a record.

        The record comes first: a model without one would be unknown, a record without its file is not used.
        """
        self.write_record(record)
        with finishing(self.model_path(record.id)):
            os.replace(file, self.model_path(record.id))
            sync_folder(self.models)

    def drop(self, name: str) -> None:
        """Remove a model's file and leave its record.

        Raises
        ------
        RecipeError
            It is the model that serves.
        """
        if name == self.current_id():
            raise RecipeError(f"the model {name} serves, so it stays; roll back first")
        self.model_path(name).unlink(missing_ok=True)

    def forget(self, name: str) -> None:
        """Remove the record of a model without a file."""
        (self.models / f"{name}.json").unlink(missing_ok=True)

    def clear_inputs(self, keep: Collection[str]) -> None:
        """Remove what was fetched, but for files whose names begin with one of `keep`."""
        for path in self.inputs.iterdir():
            if ownership.FETCHED.fullmatch(path.name) and not path.name.startswith(tuple(keep)):
                path.unlink()

    def clear_work(self, keep: str | None = None) -> None:
        """Remove files in the making, but for those whose names begin with `keep`."""
        for path in self.work.iterdir():
            if ownership.WORK.fullmatch(path.name) and (
                keep is None or not path.name.startswith(keep)
            ):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    # -- which one serves --------------------------------------------------------------------------

    def history(self) -> list[str]:
        """Return ids in the order of their promotion; the last one serves."""
        current = self.current_id()
        if current is None:
            return []
        try:
            names = self._history.read_text(encoding="ascii", errors="replace").split()
        except FileNotFoundError:
            names = []
        names = [
            name for name in names if ownership.ID.fullmatch(name)
        ]  # not what a bad card made of them
        if current not in names:
            return [current]
        end = len(names) - names[::-1].index(current)
        return names[:end]

    def previous(self) -> str | None:
        """Return the id of the model that `roll_back` would return to, None where there is none."""
        current = self.current_id()
        names = [name for name in self.history() if name != current and self.has_model(name)]
        decisions = {one.id: one.decision for one in self.records()}
        sound = [name for name in names if decisions.get(name, "rolled_back") != "rolled_back"]
        return sound[-1] if sound else None

    def promote(self, name: str, reason: str) -> None:
        """Let a model serve: after this, `current.gguf` leads to it. Doing it twice changes nothing.

        Parameters
        ----------
        name : str
            Its id.
        reason : str
            Why, for its record and the log.

        Raises
        ------
        OutputError
            The model is not here, or the disk refused.
        """
        if not self.has_model(name):
            raise OutputError("is not here, so it cannot be promoted", path=self.model_path(name))
        self.write_record(replace(self.record(name), decision="promoted", reason=reason))
        is_done = name == self.current_id()
        if not is_done:
            self._write_history([*self.history(), name])
            self._point_to(name)
        event = {"event": "promoted", "id": name, "previous": self.previous(), "reason": reason}
        self._log_switch(event, is_done=is_done)

    def roll_back(self, reason: str, bad: str | None = None) -> str:
        """Let the model before serve again, and return its id. Doing it twice for one id changes nothing.

        Parameters
        ----------
        reason : str
            Why, for the record of the bad model and the log.
        bad : str, optional
            The id that must not serve; by default that which serves now.

        Raises
        ------
        OutputError
            There is no model before it, or the disk refused.
        """
        current = self.current_id()
        bad = bad or current
        is_done = bad != current
        before = current if is_done else self.previous()
        if bad is None or before is None:
            raise OutputError("has no earlier model to roll back to", path=self.path)
        with contextlib.suppress(FormatError):  # lost with its file; the log has the reason
            self.write_record(replace(self.record(bad), decision="rolled_back", reason=reason))
        if not is_done:
            self._point_to(before)
        self._write_history(self.history())
        event = {"event": "rolled_back", "id": bad, "to": before, "reason": reason}
        self._log_switch(event, is_done=is_done)
        return before

    def finish(self) -> None:
        """End a roll back that a power cut came into. Call it first after `locked`.

        A model that serves and whose record is damaged gets another one, so that updates go on.
        """
        try:
            current = self.current()
        except FormatError:
            if (name := self.serving_id()) is not None:
                self._write_record_anew(name)
            return
        if current is not None and current.decision == "rolled_back" and self.previous():
            self.roll_back(current.reason)

    def _write_record_anew(self, name: str) -> None:
        record = record_of_file(self.model_path(name), self.path)
        if record.id != name:
            raise FormatError(
                "is damaged, and so is its record; remove both, and run edgemerge update --again",
                path=self.model_path(name),
            )
        self.write_record(record)
        self.append_log({"event": "repaired", "id": name, "reason": record.reason})

    def _point_to(self, name: str) -> None:
        ownership.check_link(self.current_path)
        link = self.path / f"{ownership.CURRENT}.new"
        with finishing(self.current_path):
            link.unlink(missing_ok=True)
            link.symlink_to(self.model_path(name).relative_to(self.path))
            os.replace(link, self.current_path)
            sync_folder(self.path)

    def _write_history(self, names: list[str]) -> None:
        write_file(self._history, "".join(f"{name}\n" for name in names).encode())

    # -- what is done ------------------------------------------------------------------------------

    def append_log(self, event: Mapping[str, Any]) -> None:
        """Write an event durably to the log; `event` of it says what happened.

        Raises
        ------
        OutputError
            The log cannot be written.
        """
        append_event(self._log, event)

    def last_log(self, n_lines: int) -> list[dict[str, Any]]:
        """Return up to `n_lines` of the newest events, the oldest of them first."""
        return last_events(self._log, n_lines)

    def _log_switch(self, event: Mapping[str, Any], *, is_done: bool) -> None:
        """Write a switch down; where it was done before, only if the power went before it was written."""
        if is_done:
            last = [one for one in self.last_log(RECENT) if one.get("id") == event["id"]]
            if last and last[-1].get("event") == event["event"]:
                return
        self.append_log(event)

    def trying(self) -> dict[str, Any] | None:
        """Return what is being done, or was when the power went; None where nothing is."""
        return _read_json(self._trying)

    def settled(self) -> dict[str, Any] | None:
        """Return what the last update came to, None before the first."""
        return _read_json(self._settled)

    def try_(self, state: Mapping[str, Any]) -> None:
        """Note what is being done."""
        _write_json(self._trying, state)

    def settle(self, state: Mapping[str, Any]) -> None:
        """Note what an update came to: from now on, nothing is being done."""
        _write_json(self._settled, state)
        with finishing(self._trying):
            self._trying.unlink(missing_ok=True)
            sync_folder(self.path)


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, indent=1)
    write_file(path, f"{text}\n".encode(errors="backslashreplace"))  # of a path: JSON's escapes


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return parse_object(raw, path)
    except FormatError:  # of a card that fails: it is done again
        return None
