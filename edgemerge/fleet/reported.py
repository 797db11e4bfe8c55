"""The report that a device leaves of its last update: one small JSON file, which is a stranger's."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgemerge.errors import FormatError
from edgemerge.finding.json_objects import parse_object
from edgemerge.plain_text import plain

__all__ = ["OUTCOMES", "DeviceReport", "ReportedModel", "Settled", "TaskScore"]
__all__ += ["read_report"]

REPORT_VERSION = 1
OUTCOMES = ("promoted", "unchanged", "refused", "rolled_back", "failed")
MAX_BYTES = 1 << 20  # of a report; one of a merge of a thousand deltas has some 200 KB
MAX_VALUES = 20_000
MAX_NAME = 255  # characters of names, versions and digests: what a file's name may have
MAX_ITEMS = 64  # tasks, versions and failures that are kept of one report
MAX_SENTENCE = 400  # characters that are kept of a reason or a failure
MAX_COUNT = 1 << 53  # of bytes and questions: JSON's numbers are exact up to here


@dataclass(frozen=True, slots=True)
class TaskScore:
    """How many of `n` questions were answered right."""

    right: int
    n: int

    @property
    def accuracy(self) -> float:
        """Part of right answers, 0 to 1."""
        return self.right / self.n


@dataclass(frozen=True, slots=True)
class ReportedModel:
    """A model as a device tells of it.

    Attributes
    ----------
    id, sha256, method : str
        Name on the device, digest in hexadecimal digits, merge method.
    n_bytes : int
        Size of its file.
    made : datetime
        When it was merged.
    n_inputs : int
        Of how many models and deltas it was made.
    signed_by : str or None
        The keys that vouch for its inputs, `MAX_ITEMS` at most, with spaces between them.
    scores : mapping of str to TaskScore
        By task.
    """

    id: str
    sha256: str
    method: str
    n_bytes: int
    made: datetime
    n_inputs: int
    signed_by: str | None
    scores: Mapping[str, TaskScore]


@dataclass(frozen=True, slots=True)
class Settled:
    """What an earlier update came to, one of `OUTCOMES`, and why."""

    outcome: str
    reason: str


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """What a device tells of its last update; every text in it is plain and short.

    Attributes
    ----------
    device : str
        Its name, which is the file's.
    time : datetime
        When it was written, by the device's clock.
    outcome : str
        One of `OUTCOMES`.
    reason : str
        Why, in a sentence.
    settled : Settled or None
        Where nothing changed: what the update before came to.
    current, tried : ReportedModel or None
        What is served now, and what was tried in this update.
    previous : str or None
        The model before, to which it could go back.
    seconds : float
        That the update took.
    bytes_fetched : int
        That came over the network.
    versions : mapping of str to str
        Of what the current model was made of, by name.
    edgemerge : str
        The program's version.
    failures : tuple of str
        What went wrong.
    """

    device: str
    time: datetime
    outcome: str
    reason: str
    settled: Settled | None
    current: ReportedModel | None
    tried: ReportedModel | None
    previous: str | None
    seconds: float
    bytes_fetched: int
    versions: Mapping[str, str]
    edgemerge: str
    failures: tuple[str, ...]


def read_report(path: Path) -> DeviceReport:
    """Read and check a report.

    Raises
    ------
    FormatError
        It cannot be read, is no regular file, is too large, or something in it is not as it has to be.
    """
    values = _Object(parse_object(_read(path), path, max_values=MAX_VALUES), path)
    if (version := values.number("edgemerge_report", MAX_COUNT)) != REPORT_VERSION:
        raise FormatError(
            f"is a report of version {version}; this edgemerge reads {REPORT_VERSION}, update one of both",
            path=path,
        )
    device = values.text("device")
    if device != plain(path.stem):
        raise FormatError(
            f"states that it is of the device {device!r}, and is called otherwise; each device has to "
            "write its own file",
            path=path,
        )
    return DeviceReport(
        device=device,
        time=values.time("time"),
        outcome=values.outcome(),
        reason=values.sentence("reason"),
        settled=_settled(values.part("settled")),
        current=_model(values.part("current")),
        tried=_model(values.part("tried")),
        previous=values.text_or_none("previous"),
        seconds=values.sum_of("seconds"),
        bytes_fetched=values.number("bytes_fetched", MAX_COUNT),
        versions=values.texts("versions"),
        edgemerge=values.text("edgemerge"),
        failures=values.sentences("failures"),
    )


def _read(path: Path) -> bytes:
    """Read at most `MAX_BYTES`: no link, pipe or device, which may lead elsewhere or never end."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        with open(os.open(path, flags), "rb") as file:
            is_file = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            raw = file.read(MAX_BYTES + 1) if is_file else b""
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror}); send it again", path=path) from error
    if not is_file:
        raise FormatError("is no regular file; remove it", path=path)
    if len(raw) > MAX_BYTES:
        raise FormatError(f"has more than {MAX_BYTES >> 10} KiB, as no report has", path=path)
    return raw


def _model(values: _Object | None) -> ReportedModel | None:
    if values is None:
        return None
    return ReportedModel(
        id=values.text("id"),
        sha256=values.text("sha256"),
        method=values.text("method"),
        n_bytes=values.number("bytes", MAX_COUNT),
        made=values.time("made"),
        n_inputs=len(values.array("made_of")),
        signed_by=values.words_or_none("signed_by"),
        scores={name: _score(score) for name, score in values.parts("scores")},
    )


def _settled(values: _Object | None) -> Settled | None:
    return None if values is None else Settled(values.outcome(), values.sentence("reason"))


def _score(values: _Object) -> TaskScore:
    n = values.number("n", MAX_COUNT)
    right = values.number("right", n)
    if n == 0:
        raise values.error("n", "a number from 1")
    return TaskScore(right, n)


class _Object:
    """One JSON object of a report, asked for values by key; `where` is its own place in the file."""

    def __init__(self, values: Mapping[str, Any], path: Path, where: str = "") -> None:
        self._values, self._path, self._where = values, path, where

    def error(self, key: str, wanted: str) -> FormatError:
        """Say what a value has to be."""
        return FormatError(f"{self._where}{key[:MAX_NAME]!r} is not {wanted}", path=self._path)

    def text(self, key: str) -> str:
        """Return a short text without its unprintable characters."""
        value = self._values.get(key)
        if not isinstance(value, str) or len(value) > MAX_NAME:
            raise self.error(key, f"a text of at most {MAX_NAME} characters")
        return plain(value)

    def outcome(self) -> str:
        """Return what an update came to, one of `OUTCOMES`."""
        outcome = self.text("outcome")
        if outcome not in OUTCOMES:
            raise self.error("outcome", f"one of {', '.join(OUTCOMES)}")
        return outcome

    def text_or_none(self, key: str) -> str | None:
        """Return the same, or None for null."""
        return None if self._values.get(key) is None else self.text(key)

    def words_or_none(self, key: str) -> str | None:
        """Return the first words of a text, each of them short, or None for null."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, str) or any(len(word) > MAX_NAME for word in value.split()):
            raise self.error(key, f"a text of words of at most {MAX_NAME} characters")
        return plain(" ".join(value.split()[:MAX_ITEMS]))

    def sentence(self, key: str) -> str:
        """Return a text of any length, cut."""
        value = self._values.get(key)
        if not isinstance(value, str):
            raise self.error(key, "a text")
        return _cut(value)

    def sentences(self, key: str) -> tuple[str, ...]:
        """Return a list of such texts, cut."""
        values = self.array(key)
        if not all(isinstance(value, str) for value in values):
            raise self.error(key, "a list of texts")
        return tuple(_cut(value) for value in values[:MAX_ITEMS])

    def number(self, key: str, most: int) -> int:
        """Return a whole number from 0 to `most`."""
        value = self._values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            raise self.error(key, f"a whole number from 0 to {most}")
        return value

    def time(self, key: str) -> datetime:
        """Return a time of ISO 8601, in UTC."""
        try:
            # A time without a zone would be a local one, of another place.
            found = datetime.fromisoformat(self.text(key))
            if found.tzinfo is None:
                raise ValueError
            return found.astimezone(UTC)
        except (ValueError, OverflowError):
            raise self.error(key, "a time such as 2026-03-01T02:15:00+00:00") from None

    def sum_of(self, key: str) -> float:
        """Return the sum of an object of numbers, each from 0 to a year in seconds."""
        values = self._object(key).values()
        for value in values:
            if not isinstance(value, int | float) or not 0 <= value <= 366 * 86_400:
                raise self.error(key, "an object of seconds")
        return float(sum(values))

    def texts(self, key: str) -> dict[str, str]:
        """Return an object of short texts."""
        inner = _Object(self._object(key), self._path, f"{self._where}{key!r}, ")
        return {plain(name): inner.text(name) for name in self._names(key)}

    def parts(self, key: str) -> list[tuple[str, _Object]]:
        """Return names and objects of an object of them."""
        inner = _Object(self._object(key), self._path, f"{self._where}{key!r}, ")
        found = [(plain(name), inner.part(name)) for name in self._names(key)]
        return [(name, part) for name, part in found if part is not None]

    def part(self, key: str) -> _Object | None:
        """Return an object, or None for null."""
        if self._values.get(key) is None:
            return None
        return _Object(self._object(key), self._path, f"{self._where}{key[:MAX_NAME]!r}, ")

    def array(self, key: str) -> list[Any]:
        """Return a list."""
        value = self._values.get(key)
        if not isinstance(value, list):
            raise self.error(key, "a list")
        return value

    def _names(self, key: str) -> list[str]:
        names = list(self._object(key))[:MAX_ITEMS]
        if any(len(name) > MAX_NAME for name in names):
            raise self.error(key, f"an object with names of at most {MAX_NAME} characters")
        return names

    def _object(self, key: str) -> dict[str, Any]:
        value = self._values.get(key)
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return value


def _cut(text: str) -> str:
    return plain(text if len(text) <= MAX_SENTENCE else f"{text[: MAX_SENTENCE - 1]}…")
