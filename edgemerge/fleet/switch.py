"""The steps that change which model serves. Each is noted before it is done, and can be done again.

::

    refuse      write down why, remove the file
    promote     switch the link
    watch       let the server reload, and watch what it does
    roll_back   switch the link back, let the server reload
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from typing import Any

from edgemerge.errors import FormatError, OutputError, RuntimeFailure
from edgemerge.fleet.examination import Examiner
from edgemerge.fleet.report import Report
from edgemerge.fleet.server import Server, ServerRefusal, ServerSilence, ServerUnheard
from edgemerge.fleet.site_file import Site
from edgemerge.fleet.watch import Baseline, measure_server, watch_file, watch_server
from edgemerge.site.folder import SiteFolder
from edgemerge.site.pruning import drop_tried, prune
from edgemerge.site.record import ModelRecord, now

__all__ = ["Switch", "roll_back_by_hand"]

Trying = Mapping[str, Any]
LOST = "its file was lost"
MISSED = "the server had another model than the folder says, and took this one"
NO_SERVER = "no server was there to reload: it takes the model of now when it starts"


class Switch:
    """The late steps of an update.

    Parameters
    ----------
    site : Site
        With the rule.
    folder : SiteFolder
        Locked.
    examiner : Examiner
        Asks the model where no server does.
    server : Server or None
        The device's.
    report : Report
        Told what happens.
    """

    def __init__(
        self,
        site: Site,
        folder: SiteFolder,
        examiner: Examiner,
        server: Server | None,
        report: Report,
    ) -> None:
        self._site, self._folder, self._examiner = site, folder, examiner
        self._server, self._report = server, report
        self._steps: Mapping[str, Callable[[Trying], None]] = {
            "refuse": self._refuse,
            "promote": self._promote,
            "watch": self._watch,
            "roll_back": self._roll_back,
        }

    def is_late(self, trying: Trying | None) -> bool:
        """Tell whether what was being done is one of these steps; what was lost before it is made again."""
        if trying is None or trying["step"] not in self._steps:
            return False
        if trying["step"] == "watch" and self._folder.is_lost():
            return self._folder.previous() is not None
        return trying["step"] != "promote" or self._is_whole(trying["id"])

    def _is_whole(self, name: str) -> bool:
        return self._folder.has_model(name) and self._find_record(name) is not None

    def _find_record(self, name: str) -> ModelRecord | None:
        """Return the record of a model; None where it was lost, perhaps with the file."""
        with suppress(FormatError):
            return self._folder.record(name)
        return None

    def go(self, trying: Trying) -> None:
        """Note a step, do it, and what follows it.

        Raises
        ------
        OutputError
            The disk refused.
        """
        self._folder.try_(trying)
        self._steps[trying["step"]](trying)

    def end(self, outcome: str, reason: str, trying: Trying) -> None:
        """Note what the update came to, and remove what is not needed any more."""
        self._report.outcome, self._report.reason = outcome, reason
        removed = prune(self._folder, self._site.keep)
        self._folder.clear_work()
        self._folder.append_log(
            {
                "event": "finished",
                "outcome": outcome,
                "reason": reason,
                "id": trying.get("id"),
                "serves": self._folder.current_id(),
                "removed": removed,
                "failures": self._report.failures,
            }
        )
        self._report.finish(
            self._folder, self._site.reports
        )  # before it is settled: or power cuts lose it
        self._folder.settle(
            {"digest": trying["digest"], "time": now(), "outcome": outcome, "reason": reason}
            | {"id": trying.get("id"), "lost": self._folder.is_lost()}
        )

    def check_server(self) -> None:
        """See that the server has the model of now, and can be told of a new one. It may be switched off.

        Raises
        ------
        ServerRefusal
            SITE.yml names another server, key or model.
        RuntimeFailure
            The server has another file, and a reload does not change that.
        """
        if self._server is None:
            return
        with suppress(ServerSilence):
            self._server.check()
            self._bring_back(self._server)

    def _bring_back(self, server: Server) -> None:
        """Let a server that missed a reload take the file of now."""
        current = self._folder.current_path
        if not current.is_file() or server.find_difference(current) is None:
            return
        try:
            server.reload(asks=False)
        except (ServerRefusal, ServerUnheard) as error:  # the next model may mend that
            self._report.failures.append(f"the server does not take the model of now: {error}")
            return
        if (difference := server.find_difference(current)) is not None:
            raise RuntimeFailure(difference)
        self._folder.append_log(
            {"event": "reloaded", "id": self._folder.current_id(), "reason": MISSED}
        )

    def measure(self) -> Baseline | None:
        """Look at the server before its model is replaced; None where there is none."""
        if self._server is None or self._folder.serving_id() is None:
            return None
        try:
            return measure_server(self._server, self._folder.current_path, self._site.rule)
        except (ServerSilence, ServerRefusal) as error:
            self._report.failures.append(str(error))
            return None

    def reload(self, *, asks: bool) -> str | None:
        """Let the server take the file of now; return why it does not. Without a server, nothing happens.

        Raises
        ------
        ServerRefusal
            With `asks`: SITE.yml names another server, key or model, so the file is not at fault.
        RuntimeFailure
            With `asks`: the server cannot take it at the moment, and the file is not at fault.
        """
        if self._server is None:
            return None
        try:
            self._server.reload(asks=asks)
        except ServerUnheard as unheard:
            return self._end_unheard(self._server, unheard, asks=asks)
        except ServerSilence:
            self._report.failures.append(NO_SERVER)
        except ServerRefusal as refusal:
            if asks and refusal.blames_site:
                raise
            if not asks or not refusal.is_busy:
                return str(refusal)
            if not self._is_served(self._server):
                raise _put_off(refusal) from None
        return None

    def _end_unheard(self, server: Server, unheard: ServerUnheard, *, asks: bool) -> str | None:
        """Return why a server that lives did not reload, or put it off; one that is gone is no reason.

        The new file may have brought it down: then waiting for it would keep that file for ever.
        """
        if self._is_served(server):
            return None
        with suppress(ServerSilence, ServerRefusal):
            if server.find_difference(self._folder.current_path) is not None:
                if asks:
                    raise _put_off(unheard) from None
                return str(unheard)
        self._report.failures.append(NO_SERVER)
        return None

    def _is_served(self, server: Server) -> bool:
        """Whether the server took the file of now by itself, as by a new start."""
        with suppress(ServerSilence, ServerRefusal):
            return server.serves(self._folder.current_path)
        return False

    # -- the steps ---------------------------------------------------------------------------------

    def _refuse(self, trying: Trying) -> None:
        name, reason = trying["id"], trying["reason"]
        if (record := self._find_record(name)) is not None:
            self._report.tried = replace(record, decision="refused", reason=reason)
            self._folder.write_record(self._report.tried)
        if name not in self._folder.history():
            self._folder.drop(name)
        self.end("refused", reason, trying)

    def _promote(self, trying: Trying) -> None:
        baseline = trying.get("baseline")
        if baseline is None and (found := self.measure()) is not None:
            baseline = asdict(found)
        trying = {**trying, "baseline": baseline}
        self._folder.try_(trying)
        self._folder.promote(trying["id"], trying["reason"])
        self.go({**trying, "step": "watch"})

    def _watch(self, trying: Trying) -> None:
        path = self._folder.model_path(trying["id"])
        if path.stem != self._folder.current_id():
            self.end("unchanged", "another model was chosen while the update was cut off", trying)
            return
        with self.timed("watch"):
            fault = LOST if self._folder.is_lost() else self.reload(asks=True)
            if fault is None:
                fault = self._find_fault(trying)
        self._report.tried = self._find_record(trying["id"])
        if fault is None:
            self._folder.append_log({"event": "watched", "id": path.stem, "found": "nothing amiss"})
            self.end("promoted", trying["reason"], trying)
        elif self._folder.previous() is None:
            reason = f"{fault}; there is no earlier model to roll back to"
            self.end("failed", reason, trying)
        else:
            self.go({**trying, "step": "roll_back", "reason": fault})

    def _find_fault(self, trying: Trying) -> str | None:
        current, rule = self._folder.current_path, self._site.rule
        known = trying.get("fault")
        if self._server is not None:
            try:
                crashes = self._server.look().crashes
            except (ServerSilence, ServerRefusal):
                pass
            else:
                before = Baseline.read(trying["baseline"], crashes)
                return watch_server(self._server, current, rule, before, known)
        return watch_file(self._examiner, self._folder.model_path(trying["id"]), rule, known)

    def _roll_back(self, trying: Trying) -> None:
        with self.timed("roll_back"):
            self._folder.roll_back(trying["reason"], trying["id"])
            fault = None
            if self._server is None or not self._is_served(self._server):  # it may not have left it
                fault = self.reload(asks=False)  # it served before, so it is taken as it is
            if fault is None and self._server is not None:
                with suppress(ServerSilence, ServerRefusal):
                    fault = self._server.find_difference(self._folder.current_path)
        if fault is not None:
            self._report.server_differs = True
            self._report.failures.append(f"the server did not take the earlier model: {fault}")
        self._report.tried = self._find_record(trying["id"])
        self.end("rolled_back", trying["reason"], trying)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the seconds of a step to the report."""
        started = time.monotonic()
        try:
            yield
        finally:
            spent = self._report.seconds.get(step, 0.0) + time.monotonic() - started
            self._report.seconds[step] = spent


def _put_off(why: RuntimeFailure) -> RuntimeFailure:
    return RuntimeFailure(f"{why}; the next update goes on from here")


def roll_back_by_hand(
    site: Site, examiner: Examiner, server: Server | None, *, reason: str, by: str
) -> Report:
    """Let the model before serve again, because somebody says so.

    Parameters
    ----------
    site : Site
        Of the device.
    examiner, server
        As of `Switch`.
    reason, by : str
        Why, and who says so; for the log.

    Raises
    ------
    OutputError
        There is no model to roll back to, or an update is at work.
    """
    folder, report = SiteFolder(site.folder), Report(site.device)
    if folder.current_id() is None:
        raise OutputError("has no model that serves; run edgemerge update first", path=folder.path)
    with folder.locked():
        folder.finish()
        current, before = folder.current_id(), folder.previous()
        if before is None:
            raise OutputError("has no earlier model to roll back to", path=folder.path)
        folder.append_log({"event": "asked", "for": "roll_back", "by": by, "reason": reason})
        # What was settled, or being settled, of this model stays so: the next update does not try it again.
        known = [
            one for one in (folder.trying(), folder.settled()) if one and one.get("id") == current
        ]
        digest = known[0]["digest"] if known else (folder.settled() or {}).get("digest", "")
        trying = {"digest": digest, "step": "roll_back", "id": current, "reason": reason}
        drop_tried(folder)
        try:
            Switch(site, folder, examiner, server, report).go(trying)
        except KeyboardInterrupt as error:
            error.add_note("the roll back has begun; run edgemerge update, which ends it")
            raise
    return report
