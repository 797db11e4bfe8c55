"""What the reports in a folder say of a fleet, and which devices need somebody to look at them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from edgemerge.errors import FormatError
from edgemerge.fleet.reported import DeviceReport, read_report
from edgemerge.plain_text import plain
from edgemerge.sizes import format_duration

__all__ = ["DeviceStatus", "FleetStatus", "ScoreSpan", "read_status"]

MAX_REPORTS = 5000  # of a folder
BAD = ("failed", "rolled_back")
CLOCK_SLACK = timedelta(minutes=5)  # that a device's clock may be ahead


@dataclass(frozen=True, slots=True)
class DeviceStatus:
    """One device.

    Attributes
    ----------
    name : str
        Its name.
    report : DeviceReport or None
        None where the file could not be read.
    age : float
        Seconds since the report was written.
    needs : tuple of str
        Why somebody has to look; empty where nobody has to.
    """

    name: str
    report: DeviceReport | None
    age: float
    needs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ScoreSpan:
    """Accuracies of the devices' current models on one task, ascending, each from 0 to 1."""

    task: str
    accuracies: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one, or the mean of the two in the middle."""
        low, high = (len(self.accuracies) - 1) // 2, len(self.accuracies) // 2
        return (self.accuracies[low] + self.accuracies[high]) / 2


@dataclass(frozen=True, slots=True)
class FleetStatus:
    """All devices of a folder, those first that somebody has to look at.

    Attributes
    ----------
    folder : Path
        Where the reports lie.
    time : datetime
        When they were read.
    stale_after : float
        Seconds after which a report is too old.
    devices : tuple of DeviceStatus
        One for each file.
    """

    folder: Path
    time: datetime
    stale_after: float
    devices: tuple[DeviceStatus, ...]

    @property
    def needy(self) -> tuple[DeviceStatus, ...]:
        """Return the devices that somebody has to look at."""
        return tuple(one for one in self.devices if one.needs)

    @property
    def needs_somebody(self) -> bool:
        """Whether somebody has to look. Without any report too: the folder may be the wrong one."""
        return bool(self.needy) or not self.devices

    def outcomes(self) -> Mapping[str, int]:
        """Count the outcomes of the last updates."""
        return Counter(report.outcome for report in self._reports())

    def versions(self) -> list[tuple[str, str, int]]:
        """Return name, version and number of devices of all that was published, by name, frequent first."""
        found = Counter(pair for report in self._reports() for pair in report.versions.items())
        counted = [(name, version, n) for (name, version), n in found.items()]
        return sorted(counted, key=lambda row: (row[0], -row[2], row[1]))

    def scores(self) -> list[ScoreSpan]:
        """Return what the current models score, by task."""
        found: dict[str, list[float]] = {}
        for report in self._reports():
            for task, score in report.current.scores.items() if report.current else ():
                found.setdefault(task, []).append(score.accuracy)
        return [ScoreSpan(task, tuple(sorted(found[task]))) for task in sorted(found)]

    def failures(self) -> list[tuple[str, tuple[str, ...]]]:
        """Return what went wrong and the devices that tell of it, frequent first."""
        found: dict[str, list[str]] = {}
        for one in self.devices:
            for failure in dict.fromkeys(_failures(one.report) if one.report else ()):
                found.setdefault(failure, []).append(one.name)
        by_number = sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
        return [(failure, tuple(names)) for failure, names in by_number]

    def _reports(self) -> Iterator[DeviceReport]:
        return (one.report for one in self.devices if one.report is not None)


def read_status(folder: Path, *, stale_after: float, now: datetime) -> FleetStatus:
    """Read all reports of a folder: `*.json`, but for hidden files.

    Parameters
    ----------
    folder : Path
        Where devices leave their reports.
    stale_after : float
        Seconds after which somebody has to look at a device that was silent.
    now : datetime
        The time, with its zone.

    Raises
    ------
    FormatError
        The folder has more than `MAX_REPORTS` reports. What is wrong with a single one is told of its
        device.
    OSError
        The folder cannot be read.
    """
    devices = [_read_device(path, stale_after, now) for path in _report_files(folder)]
    devices.sort(key=lambda one: (not one.needs, one.name))
    return FleetStatus(folder, now, stale_after, tuple(devices))


def _report_files(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        names = [
            entry.name
            for entry in entries
            if entry.name.endswith(".json") and not entry.name.startswith(".")
        ]
    if len(names) > MAX_REPORTS:
        raise FormatError(
            f"holds {len(names)} reports, more than {MAX_REPORTS}; give each part of the fleet a folder",
            path=folder,
        )
    return [folder / name for name in sorted(names)]


def _read_device(path: Path, stale_after: float, now: datetime) -> DeviceStatus:
    name = plain(path.stem)
    try:
        report = read_report(path)
    except FormatError as error:
        # The table names the device already; the folder would only make the line longer.
        said = plain(str(error)).removeprefix(f"{plain(str(path))}: ")
        return DeviceStatus(name, None, 0.0, (f"report {said}",))
    age = (now - report.time).total_seconds()
    return DeviceStatus(name, report, age, tuple(_needs(report, age, stale_after)))


def _failures(report: DeviceReport) -> Iterator[str]:
    if report.outcome == "failed":
        yield report.reason
    yield from report.failures


def _needs(report: DeviceReport, age: float, stale_after: float) -> Iterator[str]:
    """Say why somebody has to look. A model that was refused is none: that is what the trial is for.

    Where nothing changed since, the update before counts: a device does not mend itself by waiting.
    """
    last = report.settled or report
    if last.outcome in BAD:
        yield f"{last.outcome.replace('_', ' ')}: {last.reason}"
    yield from (failure for failure in report.failures if failure != report.reason)
    if report.current is None:
        yield "has no model to serve"
    if age > stale_after:
        yield f"silent for {format_duration(age)}"
    if age < -CLOCK_SLACK.total_seconds():
        yield f"its clock is ahead by {format_duration(-age)}"
