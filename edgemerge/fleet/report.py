"""What one update tells of itself, and the file of it that the fleet's status reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgemerge.errors import EdgemergeError, FormatError, OutputError
from edgemerge.fleet.site_file import Site
from edgemerge.output.file import write_file
from edgemerge.site.folder import SiteFolder
from edgemerge.site.record import ModelRecord, now

__all__ = ["Report", "reporting"]

GOOD = ("promoted", "refused", "unchanged")


@dataclass(slots=True)
class Report:
    """One update, or one roll back.

    Attributes
    ----------
    device : str
        The site's name.
    outcome : str
        promoted, refused, unchanged, rolled_back or failed.
    reason : str
        Why, in a sentence.
    current, tried : ModelRecord or None
        The model that serves now, and the one that was tried.
    previous : str or None
        Id of the model that a roll back would return to.
    seconds : mapping of str to float
        By step.
    bytes_fetched : int
        From the registry.
    settled : mapping or None
        Of an update that found nothing changed: what the one before came to: `outcome`, `time`, `reason`.
    failures : list of str
        What went wrong beside it, in sentences.
    server_differs : bool
        Whether a running server still serves another model than the folder says.
    """

    device: str
    outcome: str = "failed"
    reason: str = ""
    current: ModelRecord | None = None
    tried: ModelRecord | None = None
    previous: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    bytes_fetched: int = 0
    settled: Mapping[str, Any] | None = None
    failures: list[str] = field(default_factory=list)
    server_differs: bool = False

    @property
    def is_good(self) -> bool:
        """Whether nobody has to look at the device."""
        return self.outcome in GOOD

    @property
    def versions(self) -> dict[str, str]:
        """Version by name of all that the model was made of that serves now."""
        return {} if self.current is None else self.current.versions()

    def as_json(self) -> dict[str, Any]:
        """Return plain types, as the fleet's status reads them."""
        from importlib.metadata import version

        return {
            "edgemerge_report": 1,
            "device": self.device,
            "time": now(),
            "outcome": self.outcome,
            "reason": self.reason,
            "settled": None
            if self.settled is None
            else {key: self.settled[key] for key in ("outcome", "time", "reason")},
            "current": None if self.current is None else self.current.as_json(),
            "tried": None if self.tried is None else self.tried.as_json(),
            "previous": self.previous,
            "seconds": {step: round(value, 3) for step, value in self.seconds.items()},
            "bytes_fetched": self.bytes_fetched,
            "versions": self.versions,
            "edgemerge": version("edgemerge"),
            "failures": list(self.failures),
        }

    def finish(self, folder: SiteFolder, reports: Path | None) -> None:
        """Note which model serves now, and write DEVICE.json; where that fails, the report says so itself."""
        try:
            self.current, self.previous = folder.current(), folder.previous()
            if folder.is_lost():
                self.failures.append(
                    f"{folder.current_path}: the file of the model that serves is lost; run edgemerge update "
                    "--again, or edgemerge rollback"
                )
        except (FormatError, OSError) as error:
            self.failures.append(str(error))
        if reports is None:
            return
        path = reports / f"{self.device}.json"
        text = json.dumps(self.as_json(), ensure_ascii=False, indent=1)
        raw = text.encode(errors="backslashreplace")  # of a path: JSON's escapes
        try:
            write_file(path, raw)
        except OutputError as error:
            self.failures.append(f"the report was not written: {error}")


@contextmanager
def reporting(site: Site) -> Iterator[None]:
    """Report what keeps an update from its start, and raise it; `Update.run` reports what comes later.

    Parameters
    ----------
    site : Site
        Of the device.
    """
    try:
        yield
    except (EdgemergeError, OSError) as error:
        report = Report(site.device, reason=str(error))
        report.finish(SiteFolder(site.folder), site.reports)
        for failure in report.failures:
            error.add_note(failure)
        raise
