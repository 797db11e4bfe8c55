"""The update of a device, up to the decision. Power may go at any moment: the next start goes on.

Read top-down. `find` asks the registry, `fetch` gets the files, `merge` makes the new model beside the one
that serves, `ask` puts the questions to both. What was finished is found again: fetched files, the tensors of
a merge, answers. From the decision on, `edgemerge.fleet.switch` does the rest. An update that was cut off
there is ended first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from edgemerge.errors import EdgemergeError, FormatError, OutputError, RuntimeFailure
from edgemerge.fleet.declared import Declared, declare
from edgemerge.fleet.examination import Crash, Examiner, common_chunk
from edgemerge.fleet.feasible import check_feasible, compared_base
from edgemerge.fleet.ingredients import FileHashes, Ingredient, Registry, fetch_all, find_all
from edgemerge.fleet.promotion import (
    MORE_MEASUREMENTS,
    Talk,
    Verdict,
    check_texts,
    decide,
    is_slower,
)
from edgemerge.fleet.report import Report
from edgemerge.fleet.server import Server
from edgemerge.fleet.site_file import Site
from edgemerge.fleet.switch import Switch
from edgemerge.merging.run import merge
from edgemerge.site.folder import SiteFolder
from edgemerge.site.lock import Busy
from edgemerge.site.ownership import is_own
from edgemerge.site.pruning import drop_tried
from edgemerge.site.record import ID_DIGITS, ModelRecord, Score, now

__all__ = ["Update"]

Show = Callable[[str, int, int], None]


class Update:
    """One update of a device.

    Parameters
    ----------
    site : Site
        What is declared.
    examiner : Examiner
        Asks models.
    hashes : FileHashes
        Of files of this machine.
    server : Server or None
        The device's, where it has one.
    registry : Registry or None
        Of the site's experts.
    show : callable
        Told what is being done, how much of it is done, and how much there is in all; may raise to stop.
    again : bool
        Do it even if nothing changed since the last update.
    """

    def __init__(
        self,
        site: Site,
        examiner: Examiner,
        hashes: FileHashes,
        *,
        server: Server | None = None,
        registry: Registry[Any] | None = None,
        show: Show = lambda _what, _done, _total: None,
        again: bool = False,
    ) -> None:
        self._site, self._examiner, self._hashes = site, examiner, hashes
        self._registry, self._show, self._again = registry, show, again
        self._folder = SiteFolder(site.folder)
        self._report = Report(site.device)
        self._switch = Switch(site, self._folder, examiner, server, self._report)

    def run(self) -> Report:
        """Bring the device to what is declared, as far as the rule allows; say what came of it.

        Raises
        ------
        Busy
            Another update is at work there.
        """
        try:
            self._folder.make()
            with self._folder.locked():
                self._folder.finish()
                self._do()
        except Busy:
            raise
        except (EdgemergeError, OSError) as error:
            self._fail(str(error))
        except KeyboardInterrupt as error:
            error.add_note("the same command goes on from here")
            raise
        return self._report

    def _fail(self, reason: str) -> None:
        self._report.outcome, self._report.reason = "failed", reason
        try:
            if is_own(self._folder.path):
                self._log("failed", reason=reason)
        except (OutputError, OSError) as error:  # the report may go to another disk
            self._report.failures.append(str(error))
        self._report.finish(self._folder, self._site.reports)

    def _do(self) -> None:
        trying = self._folder.trying()
        if trying is not None and self._switch.is_late(trying):
            self._log("resumed", step=trying["step"], id=trying["id"])
            self._switch.go(trying)
            return
        declared = self._declare()
        if trying is None and self._is_settled(declared):
            return
        check_feasible(declared, needs_base=declared.needs_base(self._folder))
        self._switch.check_server()
        if trying is None or trying["digest"] != declared.digest:
            drop_tried(self._folder)
            trying = {"digest": declared.digest, "step": "merge", "started": now()}
            self._log_start(declared)
            self._folder.try_(trying)
        else:
            self._log("resumed", step=trying["step"])
        self._make_and_judge(declared, trying)

    # -- before the merge --------------------------------------------------------------------------

    def _declare(self) -> Declared:
        with self._switch.timed("find"):
            found: list[Ingredient] = []
            if self._site.merge.recipe is None:
                if self._registry is not None:
                    self._registry.refresh()
                found = find_all(self._site, self._hashes, self._registry)
            declared = declare(self._site, found, self._hashes)
            self._hashes.keep()
        return declared

    def _is_settled(self, declared: Declared) -> bool:
        """Whether this update would come to the same as the last one."""
        settled = declared.settled_in(self._folder)
        if self._again or settled is None:
            return False
        self._switch.check_server()
        self._report.outcome, self._report.settled = "unchanged", settled
        then = f"then {settled['outcome'].replace('_', ' ')}: {settled['reason']}"
        self._report.reason = f"nothing changed since {settled['time']}; {then}"
        if settled["outcome"] == "promoted" and settled.get("id") != self._folder.current_id():
            self._report.reason += "; by hand, another model was put in its place"
        self._log("unchanged", digest=declared.digest)
        self._report.finish(self._folder, self._site.reports)
        return True

    def _log_start(self, declared: Declared) -> None:
        self._log(
            "started",
            device=self._site.device,
            site=str(self._site.path),
            digest=declared.digest,
            made_of=[asdict(part) for part in declared.parts],
            method=self._site.merge.method or "recipe",
            settings=declared.settings(),
            serves=self._folder.current_id(),
        )

    def _log(self, event: str, **facts: Any) -> None:
        self._folder.append_log({"event": event, **facts})

    def _progress(self, what: str) -> Callable[[int, int], None]:
        return partial(self._show, what)

    # -- the merge and the questions ---------------------------------------------------------------

    def _make_and_judge(self, declared: Declared, trying: Mapping[str, Any]) -> None:
        names = [one.entry.file_name for one in declared.found if one.entry is not None]
        self._folder.clear_inputs(names)  # of other states
        with self._switch.timed("fetch"):
            found, n_bytes = fetch_all(
                declared.found, self._registry, self._folder, self._progress("fetching")
            )
            self._report.bytes_fetched = n_bytes
        declared = declared.with_files(found)
        was_lost = self._folder.is_lost()
        record = self._make(declared, trying)
        state = {**(self._folder.trying() or trying), "id": record.id}  # with what `_make` noted
        if record.id == self._folder.current_id():
            reason = "the merge gives the model that serves"
            if was_lost:
                self._switch.check_server()  # it takes the new file
                reason += ", whose file was lost"
            self._switch.end("unchanged", reason, state)
            return
        self._report.tried = record
        try:
            record, verdict = self._judge(declared, record)
        except Crash as error:
            self._switch.go({**state, "step": "refuse", "reason": str(error)})
            return
        self._folder.write_record(record)
        self._log(
            "decided",
            id=record.id,
            against=self._folder.serving_id() or "base",
            promoted=verdict.is_promoted,
            reason=verdict.reason,
            findings=verdict.as_json(),
        )
        step = "promote" if verdict.is_promoted else "refuse"
        self._switch.go({**state, "step": step, "reason": verdict.reason, "fault": verdict.fault})

    def _make(self, declared: Declared, trying: Mapping[str, Any]) -> ModelRecord:
        """Merge, and take the result into the folder under its id; or find it there after a power cut."""
        if "id" in trying and self._folder.has_model(trying["id"]):
            with suppress(FormatError):  # it was cut off before that was written
                return self._folder.record(trying["id"])
        output = self._folder.work / f"{declared.digest[:ID_DIGITS]}.gguf"
        self._folder.clear_work(output.name)  # of merges of other states
        recipe = declared.recipe()
        with self._switch.timed("merge"):
            if output.exists():  # finished before the power went
                sha256 = FileHashes(None).of(output, self._progress("hashing"))
            else:
                report = merge(
                    recipe,
                    output,
                    memory=self._site.merge.memory,
                    threads=self._site.threads,
                    progress=self._progress("merging"),
                )
                sha256 = report.sha256
        name = sha256[:ID_DIGITS]
        record = ModelRecord(
            id=name,
            file=str(self._folder.model_path(name).relative_to(self._folder.path)),
            sha256=sha256,
            bytes=output.stat().st_size,
            made=now(),
            made_of=declared.parts,
            method=recipe.title,
            settings=declared.settings(),
            signed_by=declared.signed_by,
        )
        if name == self._folder.serving_id():
            output.unlink()
            return record
        event = "merged"
        if name == self._folder.current_id():
            event, record = "restored", self._as_it_was(record)
        self._log(event, id=name, sha256=sha256, bytes=record.bytes)
        self._folder.try_({"is_spared": self._is_of_somebody(name), **trying, "id": name})
        self._folder.add(output, record)
        return record

    def _is_of_somebody(self, name: str) -> bool:
        """Tell whether a model lies here that nobody has decided about, as one that was made on the page."""
        if not self._folder.has_model(name):
            return False
        try:
            return self._folder.record(name).decision is None
        except FormatError:
            return True

    def _as_it_was(self, record: ModelRecord) -> ModelRecord:
        """Return the record of a model whose file was lost, or a new one where it was lost, too."""
        with suppress(FormatError):
            return self._folder.record(record.id)
        reason = "its record was lost, and is written anew"
        return replace(record, decision="promoted", reason=reason)

    def _judge(self, declared: Declared, record: ModelRecord) -> tuple[ModelRecord, Verdict]:
        """Ask the model that serves, or where none does the base, and the new one."""
        serves = self._folder.serving_id()
        if serves is not None:
            old_sha256 = self._folder.record(serves).sha256
            old_path = self._folder.model_path(serves)
        else:
            base = compared_base(self._site, declared.base)
            assert base.path is not None  # it was fetched
            old_path, old_sha256 = base.path, base.sha256
        new_path = self._folder.model_path(record.id)
        check_texts(self._site, old_path, new_path)
        chunk = common_chunk((old_path, new_path))  # the same for both, so that they compare
        with self._switch.timed("ask"):
            try:
                old = self._examiner.ask_all(old_path, old_sha256, self._show, chunk)
            except Crash as error:
                raise RuntimeFailure(str(error)) from error  # no reason to refuse the new one
            new = self._examiner.ask_all(new_path, record.sha256, self._show, chunk)
            old_talk, new_talk = self._talk_to_both(old_path, new_path)
        verdict = decide(self._site.rule, old, new, old_talk, new_talk)
        record = replace(
            record,
            scores={name: Score(*counted) for name, counted in new.counts().items()},
            perplexities=new.perplexities(),
            speed=new_talk.speed,
        )
        return record, verdict

    def _talk_to_both(self, old: Path, new: Path) -> tuple[Talk, Talk]:
        """Ask both the smoke question, one after the other; the new one is slow if it is slow each time.

        What else the device does at that moment can halve a speed, and a refusal is for good.
        """
        for _ in range(1 + MORE_MEASUREMENTS):
            talks = self._examiner.talk(old), self._examiner.talk(new)
            if not is_slower(self._site.rule, *talks):
                break
        return talks
