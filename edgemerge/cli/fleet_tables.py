"""What `edgemerge fleet status` tells: as JSON, as a table, as sections of a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from edgemerge.cli.terminal import print_table
from edgemerge.fleet.reported import OUTCOMES
from edgemerge.plain_text import plain
from edgemerge.sizes import format_duration, format_size

if TYPE_CHECKING:
    from edgemerge.fleet.reported import DeviceReport, ReportedModel
    from edgemerge.fleet.status import DeviceStatus, FleetStatus
    from edgemerge.reports.record import Section

__all__ = ["as_json", "page_sections", "print_status"]

HEADER = ("device", "seen", "update", "model", "versions", "scores", "")
MAX_ID = 16  # characters of a model's name that are shown in the terminal
MAX_PARTS = 3  # scores and versions of a device that are shown there
MAX_NOTE = 76
MAX_DEVICES = 5  # that are named beside a failure there


def as_json(status: FleetStatus) -> dict[str, Any]:
    """Return all that was found as plain types."""
    return {
        "folder": str(status.folder),
        "time": status.time.isoformat(timespec="seconds"),
        "stale_seconds": status.stale_after,
        "needs_somebody": status.needs_somebody,
        "outcomes": dict(status.outcomes()),
        "versions": [
            {"name": name, "version": version, "devices": n}
            for name, version, n in status.versions()
        ],
        "scores": [
            {
                "task": one.task,
                "devices": len(one.accuracies),
                "least": one.accuracies[0],
                "median": one.median,
                "most": one.accuracies[-1],
            }
            for one in status.scores()
        ],
        "failures": [
            {"failure": failure, "devices": list(names)} for failure, names in status.failures()
        ],
        "devices": [_device_json(one) for one in status.devices],
    }


def _device_json(one: DeviceStatus) -> dict[str, Any]:
    report = one.report
    if report is None:
        return {"device": one.name, "readable": False, "needs": list(one.needs)}
    return {
        "device": one.name,
        "readable": True,
        "needs": list(one.needs),
        "time": report.time.isoformat(timespec="seconds"),
        "age_seconds": round(one.age),
        "outcome": report.outcome,
        "reason": report.reason,
        "settled": None if report.settled is None else asdict(report.settled),
        "current": _model_json(report.current),
        "tried": _model_json(report.tried),
        "previous": report.previous,
        "seconds": report.seconds,
        "bytes_fetched": report.bytes_fetched,
        "versions": dict(report.versions),
        "edgemerge": report.edgemerge,
        "failures": list(report.failures),
    }


def _model_json(model: ReportedModel | None) -> dict[str, Any] | None:
    if model is None:
        return None
    return {**asdict(model), "made": model.made.isoformat(timespec="seconds")}


def print_status(status: FleetStatus) -> None:
    """Print one line for each device, then what they have in common."""
    if not status.devices:
        print(f"{plain(str(status.folder))}: no report is there; see that it is the right folder")
        return
    print_table(HEADER, [_line(one) for one in status.devices])
    print()
    print(_summary(status))
    for one in status.scores():
        print(f"  {one.task}: {_span(one.accuracies)}, median {100 * one.median:.1f} %")
    for failure, names in status.failures():
        more = f" and {len(names) - MAX_DEVICES} more" if len(names) > MAX_DEVICES else ""
        print(f"  {_short(failure, MAX_NOTE)}: {', '.join(names[:MAX_DEVICES])}{more}")


def _line(one: DeviceStatus) -> tuple[str, ...]:
    report = one.report
    note = _short("; ".join(one.needs) or _news(report), MAX_NOTE)
    if report is None:
        return (one.name, "?", "?", "", "", "", f"! {note}")
    return (
        one.name,
        _age(one),
        report.outcome.replace("_", " "),
        _short(report.current.id, MAX_ID) if report.current else "none",
        _some([f"{name} {version}" for name, version in report.versions.items()]),
        _some(_scores(report.current)),
        f"! {note}" if one.needs else note,
    )


def _news(report: DeviceReport | None) -> str:
    """Say why a device kept its model; what is as it should be needs no words."""
    last = report and (report.settled or report)
    return last.reason if last and last.outcome == "refused" else ""


def _age(one: DeviceStatus) -> str:
    return f"{format_duration(max(0.0, one.age))} ago"


def _scores(model: ReportedModel | None) -> list[str]:
    found = model.scores.items() if model else ()
    return [f"{task} {100 * score.accuracy:.1f} %" for task, score in found]


def _some(parts: Sequence[str]) -> str:
    more = [f"{len(parts) - MAX_PARTS} more"] if len(parts) > MAX_PARTS else []
    return ", ".join([*(_short(part, MAX_ID + 8) for part in parts[:MAX_PARTS]), *more])


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _summary(status: FleetStatus) -> str:
    counts = status.outcomes()
    said = [f"{counts[name]} {name.replace('_', ' ')}" for name in OUTCOMES if counts.get(name)]
    n = len(status.devices)
    n_needy = len(status.needy)
    needy = f"; {n_needy or 'none'} need{'s' * (n_needy < 2)} somebody{' (!)' * bool(n_needy)}"
    return f"{n} device{'s' * (n != 1)}: {', '.join(said) or 'no report can be read'}{needy}"


def _span(accuracies: Sequence[float]) -> str:
    low, high = (f"{100 * value:.1f}" for value in (accuracies[0], accuracies[-1]))
    return f"{low} %" if low == high else f"{low} to {high} %"


def page_sections(status: FleetStatus) -> list[Section]:
    """Return what the page says of the fleet."""
    from edgemerge.reports.record import Section

    when = f"Read {status.time:%Y-%m-%d %H:%M} UTC of {status.folder}."
    said = [(_summary(status) + ".", not status.needs_somebody), (plain(when), None)]
    sections = [Section("Summary", said)]
    if status.needy:
        rows = [(one.name, "; ".join(one.needs)) for one in status.needy]
        sections.append(Section("Needs somebody", (), ("device", "why"), rows))
    header = ("device", "seen", "update", "model", "versions", "right answers", "why")
    rows_of_all = [_page_row(one) for one in status.devices if one.report is not None]
    sections.append(Section("Devices", (), header, rows_of_all))
    versions = [(name, version, str(n)) for name, version, n in status.versions()]
    sections.append(Section("Versions", (), ("name", "version", "devices"), versions))
    failures = [(failure, ", ".join(names)) for failure, names in status.failures()]
    sections.append(Section("Failures", (), ("what", "devices"), failures))
    return [one for one in sections if one.sentences or one.rows]


def _page_row(one: DeviceStatus) -> tuple[str, ...]:
    report = one.report
    assert report is not None
    model = report.current
    size = f", {format_size(model.n_bytes)}, {model.method}" if model else ""
    return (
        one.name,
        _age(one),
        report.outcome.replace("_", " "),
        f"{model.id if model else 'none'}{size}",
        ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        ", ".join(_answers(model)),
        report.reason,
    )


def _answers(model: ReportedModel | None) -> Iterator[str]:
    scores: Mapping[str, Any] = model.scores if model else {}
    for task, score in scores.items():
        yield f"{task} {score.right} of {score.n} ({100 * score.accuracy:.1f} %)"
