"""What a registry's index says of one published file: the record, its checks, the order of versions.

An entry is a target of TUF. Its path is NAME/VERSION/FILE, and its `custom` has what the path does not say.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from edgemerge.errors import FormatError

if TYPE_CHECKING:
    from tuf.api.metadata import TargetFile

__all__ = [
    "KINDS",
    "MAX_LICENCE",
    "MAX_SCORES",
    "NAME",
    "VERSION",
    "Entry",
    "custom_of",
    "file_name",
]
__all__ += ["is_licence", "newest", "read_entry", "scores_text", "target_path", "version_key"]

KINDS = ("delta", "adapter", "model")
NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?", re.ASCII)
VERSION = re.compile(r"(?:0|[1-9]\d{0,8})(?:\.(?:0|[1-9]\d{0,8})){0,3}", re.ASCII)
MAX_SCORES = 1 << 14  # characters of JSON
MAX_LICENCE = 200  # characters
_BASE = re.compile(r"[0-9a-f]{8}", re.ASCII)
_KEY = re.compile(r"[0-9a-f]{32}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Entry:
    """One published file.

    Attributes
    ----------
    name, version : str
        `NAME` and `VERSION` say their form.
    file_name : str
        What the file is called where it is fetched.
    n_bytes : int
        Its size.
    sha256 : str
        Of the file, in hexadecimal.
    base : str or None
        The base's checksum, eight hexadecimal digits, as `edgemerge.formats.adapters.base_sample` has it.
        Every delta has one. Of a model it is its own; registries of before state none.
    kind : str
        One of `KINDS`.
    licence : str
        As the publisher states it; may be empty.
    scores : mapping
        Figures of `edgemerge eval`: `tasks` and `perplexity`, each by name. Empty where none are stated.
    publisher : str
        The key that published it, as `edgemerge.provenance.keys.key_id` names it.
    published : str
        When, in ISO 8601 with the zone.
    """

    name: str
    version: str
    file_name: str
    n_bytes: int
    sha256: str
    base: str | None
    kind: str
    licence: str
    scores: Mapping[str, Any]
    publisher: str
    published: str


def file_name(name: str, version: str, kind: str) -> str:
    """Say what a published file is called: versions side by side do not replace each other."""
    return f"{name}-{version}{'.delta' if kind == 'delta' else ''}.gguf"


def target_path(entry: Entry) -> str:
    """Return the path of an entry's target, as TUF names it."""
    return f"{entry.name}/{entry.version}/{entry.file_name}"


def version_key(version: str) -> tuple[int, ...]:
    """Return what versions are compared by: 1.10 comes after 1.9, and 1.0 is 1."""
    numbers = [int(part) for part in version.split(".")]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def newest(entries: Iterable[Entry]) -> Entry:
    """Return the entry of the highest version; there is one at least."""
    return max(entries, key=lambda entry: version_key(entry.version))


def custom_of(entry: Entry) -> dict[str, Any]:
    """Return what a target states beside path, length and hash; TUF's JSON has no fractions."""
    return {
        "kind": entry.kind,
        "base": entry.base,
        "licence": entry.licence,
        "scores": scores_text(entry.scores),
        "publisher": entry.publisher,
        "published": entry.published,
    }


def is_licence(stated: object) -> bool:
    """Tell whether readers take a licence: one printable line of at most `MAX_LICENCE` characters."""
    return isinstance(stated, str) and len(stated) <= MAX_LICENCE and stated.isprintable()


def scores_text(scores: Mapping[str, Any]) -> str:
    """Return finite figures as the index has them; readers take at most `MAX_SCORES` characters."""
    return json.dumps(scores, allow_nan=False, sort_keys=True)


def read_entry(path: str, target: TargetFile, index: str) -> Entry:
    """Read a target of a verified index; signed does not mean well-formed.

    Parameters
    ----------
    path : str
        Of the target.
    target : TargetFile
        What the index says of it.
    index : str
        The index, for the error.

    Raises
    ------
    FormatError
        It is not as `edgemerge publish` writes it.
    """
    stated = target.custom if isinstance(target.custom, dict) else {}
    name, _, rest = path.partition("/")
    version, _, file = rest.partition("/")
    kind, base, licence = (stated.get(key) for key in ("kind", "base", "licence"))
    publisher, published = stated.get("publisher"), stated.get("published")
    sha256 = target.hashes.get("sha256", "")
    scores = _read_scores(stated.get("scores"))
    is_sound = (
        _fits(NAME, name)
        and _fits(VERSION, version)
        and kind in KINDS
        and file == file_name(name, version, str(kind))
        and target.length > 0
        and _fits(_SHA256, sha256)
        and (_fits(_BASE, base) or (base is None and kind != "delta"))
        and is_licence(licence)
        and _fits(_KEY, publisher)
        and _is_time(published)
        and scores is not None
    )
    if not is_sound:
        raise FormatError(
            f"has an entry {path[:100]!r} that edgemerge does not write so; update edgemerge, or tell the "
            "publisher",
            path=index,
        )
    return Entry(
        name,
        version,
        file,
        target.length,
        sha256,
        base,
        str(kind),
        str(licence),
        scores or {},
        str(publisher),
        str(published),
    )


def _fits(form: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and form.fullmatch(value) is not None


def _is_time(value: object) -> bool:
    try:
        return isinstance(value, str) and datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        return False


def _read_scores(text: object) -> dict[str, Any] | None:
    if not isinstance(text, str) or len(text) > MAX_SCORES:
        return None
    try:
        found = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value
