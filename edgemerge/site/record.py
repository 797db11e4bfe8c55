"""What a device knows of one of its models: what it was made of, how it scored, and what was decided."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgemerge.errors import FormatError

__all__ = ["DECISIONS", "ID_DIGITS", "ROLES", "ModelRecord", "Part", "Score", "now", "read_record"]
__all__ += ["record_of_file"]

DECISIONS = ("promoted", "refused", "rolled_back")
ROLES = ("base", "expert", "delta", "adapter")
ID_DIGITS = 16  # of the file's SHA-256


@dataclass(frozen=True, slots=True)
class Part:
    """One file that a model was made of.

    Attributes
    ----------
    name : str
        Of the registry's entry, or the file's.
    version : str
        The entry's; empty where the site names a path.
    sha256 : str
        Of the file, 64 hexadecimal digits.
    role : str
        base, expert, delta or adapter.
    """

    name: str
    version: str
    sha256: str
    role: str


@dataclass(frozen=True, slots=True)
class Score:
    """Right answers to the `n` questions of a task."""

    right: int
    n: int


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """One model of a site.

    Attributes
    ----------
    id : str
        The first 16 hexadecimal digits of `sha256`.
    file : str
        Where the model lies, relative to the site's folder.
    sha256 : str
        Of the whole file.
    bytes : int
        Size of the file.
    made : str
        When it was merged, ISO 8601 in UTC.
    made_of : tuple of Part
        The base first.
    method : str
        The merge method.
    settings : mapping
        Parameters of the method, type, seed and the like, as the site states them.
    signed_by : str or None
        Who vouches for the inputs: the registry's publishers.
    scores : mapping of str to Score
        By task.
    perplexities : mapping of str to float
        By text.
    speed : float or None
        Tokens/s that were written when the smoke question was asked.
    decision : str or None
        promoted, refused or rolled_back; None while it is tried.
    reason : str
        Why, in a sentence.
    """

    id: str
    file: str
    sha256: str
    bytes: int
    made: str
    made_of: tuple[Part, ...]
    method: str
    settings: Mapping[str, Any]
    signed_by: str | None = None
    scores: Mapping[str, Score] = field(default_factory=dict)
    perplexities: Mapping[str, float] = field(default_factory=dict)
    speed: float | None = None
    decision: str | None = None
    reason: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return plain types only."""
        return asdict(self)

    def versions(self) -> dict[str, str]:
        """Return the version of each input by its name; of a path, the start of its hash."""
        return {one.name: one.version or one.sha256[:ID_DIGITS] for one in self.made_of}


def now() -> str:
    """Return the time in UTC as records and logs have it: `2026-11-29T12:50:07Z`."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def record_of_file(model: Path, folder: Path) -> ModelRecord:
    """Make a record of what a file alone tells, for a model that serves and whose record is damaged.

    Parameters
    ----------
    model : Path
        The file.
    folder : Path
        The site's.
    """
    with model.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return ModelRecord(
        id=sha256[:ID_DIGITS],
        file=str(model.relative_to(folder)),
        sha256=sha256,
        bytes=model.stat().st_size,
        made=now(),
        made_of=(),
        method="unknown",
        settings={},
        decision="promoted",
        reason="its record was damaged, and is written anew",
    )


def read_record(document: Mapping[str, Any], path: Path) -> ModelRecord:
    """Check a record that was read from a file; unknown keys are left out.

    Raises
    ------
    FormatError
        A value is missing or of another type.
    """
    reader = _RecordReader(path)
    known = {one.name for one in fields(ModelRecord)}
    values = {key: value for key, value in document.items() if key in known}
    for key, read in reader.readers().items():
        if key in values:
            values[key] = read(key, values[key])
    try:
        record = ModelRecord(**values)
    except TypeError:
        missing = sorted(one for one in reader.required if one not in values)
        raise reader.error(f"lacks {', '.join(missing)}") from None
    if record.id != record.sha256[:ID_DIGITS]:
        raise reader.error(f"has the id {record.id!r}, which does not begin its SHA-256")
    return record


class _RecordReader:
    """Checks the values of one record."""

    required = ("id", "file", "sha256", "bytes", "made", "made_of", "method", "settings")

    def __init__(self, path: Path) -> None:
        self.path = path

    def error(self, problem: str) -> FormatError:
        return FormatError(f"{problem}, so it is no record of a model; remove it", path=self.path)

    def readers(self) -> Mapping[str, Callable[[str, Any], Any]]:
        texts = dict.fromkeys(("id", "file", "sha256", "made", "method", "reason"), self._text)
        return {
            **texts,
            "bytes": self._count,
            "made_of": self._parts,
            "settings": self._table,
            "signed_by": self._optional_text,
            "scores": self._scores,
            "perplexities": self._numbers,
            "speed": self._optional_number,
            "decision": self._decision,
        }

    def _text(self, key: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self.error(f"has {key} that is no text")
        return value

    def _optional_text(self, key: str, value: Any) -> str | None:
        return None if value is None else self._text(key, value)

    def _count(self, key: str, value: Any) -> int:
        if type(value) is not int or value < 0:
            raise self.error(f"has {key} that is no whole number")
        return value

    def _number(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(f"has {key} that is no number")
        return float(value)

    def _optional_number(self, key: str, value: Any) -> float | None:
        return None if value is None else self._number(key, value)

    def _table(self, key: str, value: Any) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise self.error(f"has {key} that is no table")
        return value

    def _numbers(self, key: str, value: Any) -> Mapping[str, float]:
        return {name: self._number(key, one) for name, one in self._table(key, value).items()}

    def _scores(self, key: str, value: Any) -> Mapping[str, Score]:
        return {name: self._score(key, one) for name, one in self._table(key, value).items()}

    def _score(self, key: str, value: Any) -> Score:
        table = self._table(key, value)
        return Score(*(self._count(key, table.get(name)) for name in ("right", "n")))

    def _parts(self, key: str, value: Any) -> tuple[Part, ...]:
        if not isinstance(value, list):
            raise self.error(f"has {key} that is no list")
        return tuple(self._part(key, one) for one in value)

    def _part(self, key: str, value: Any) -> Part:
        table = self._table(key, value)
        names = [one.name for one in fields(Part)]
        return Part(*(self._text(f"{key}.{name}", table.get(name)) for name in names))

    def _decision(self, key: str, value: Any) -> str | None:
        if value is not None and value not in DECISIONS:
            raise self.error(f"has {key} that is none of {', '.join(DECISIONS)}")
        return None if value is None else str(value)
