"""What in the folder of a device is edgemerge's, so that nothing of anybody else is changed or removed.

By default, a device's folder is that of its SITE.yml, where people keep files of their own. So a new folder
is taken only if none of the names that updates use is in it, and a file in it then says so. Updates remove
files of the forms below alone. A folder `registry` may be there, as one that is published, but not with the
names of what is kept of another registry.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from edgemerge.errors import EdgemergeError, OutputError
from edgemerge.formats.json_file import read_object
from edgemerge.output.file import write_file
from edgemerge.site.log import last_events
from edgemerge.site.record import ID_DIGITS, read_record

__all__ = ["ANSWERS", "CLEARED", "CURRENT", "FETCHED", "ID", "REGISTRY", "WORK"]
__all__ += ["check_free", "check_link", "is_changed", "is_own", "mark_own"]

MARKER = ".edgemerge-folder"
TEXT = b"edgemerge made this folder. Updates remove files from models, inputs, work and answers in it.\n"
CLEARED = ("models", "inputs", "work", "answers")  # folders from which updates remove files
CURRENT = "current.gguf"
FILES: tuple[str, ...] = (CURRENT, f"{CURRENT}.new", "history", "log.jsonl", "trying.json")
FILES += ("settled.json", "hashes.json")
REGISTRY = "registry"
# What python-tuf writes and replaces there; a registry that is published has other names.
SEEN = frozenset(
    ("root.json", "timestamp.json", "snapshot.json", "targets.json", "root_history", "lock")
)

ID = re.compile(rf"[0-9a-f]{{{ID_DIGITS}}}")
ANSWERS = re.compile(rf"({ID.pattern})-[0-9a-f]+\.json.*")
FETCHED = re.compile(r"[a-z0-9._-]+-[0-9.]+(\.delta)?\.gguf(\.[0-9a-f]{16}\.part)?")
# Merges of updates with what lies beside them, as copies of bases do for a while, and merges of the page;
# `.edgemerge-` began the copies of earlier versions.
WORK = re.compile(rf"{ID.pattern}\.gguf.*|page-.*|\.edgemerge-.*")
NOBODYS = re.compile(r"\..*|lost\+found")  # as a new disk or git has them, and updates leave them


def is_own(folder: Path) -> bool:
    """Tell whether a folder is a device's: it is marked, or has a log or a record of earlier versions."""
    if (folder / MARKER).is_file():
        return True
    with contextlib.suppress(EdgemergeError, OSError):
        if any("before" in one for one in last_events(folder / "log.jsonl", 1)):
            return True
    return any(map(_is_record, (folder / "models").glob("*.json")))


def check_free(folder: Path) -> None:
    """Refuse a folder, which is not a device's yet, where one of the names that updates use is taken.

    Raises
    ------
    OutputError
        One is, or the current model is no link.
    """
    check_link(folder / CURRENT)
    taken = list(_taken(folder))
    # In this order: another process may make it a device's just now.
    if taken and not is_own(folder):
        raise OutputError(
            f"has {', '.join(taken)} of somebody else, where updates change and remove files; name a folder "
            "of its own, by folder in SITE.yml or by --site; if all of it is edgemerge's, make an empty file "
            f"{MARKER} there",
            path=folder,
        )


def check_link(current: Path) -> None:
    """Refuse a file where a link is to lead to the model that serves.

    Raises
    ------
    OutputError
        It is one.
    """
    if os.path.lexists(current) and not current.is_symlink():
        raise OutputError("is no link, and updates put one there; move it elsewhere", path=current)


def is_changed(name: str, inside: Path) -> bool:
    """Tell whether updates may change a path, which is relative to a folder `name`: `CLEARED`, `REGISTRY`."""
    first = Path(inside.parts[0] if inside.parts else "")
    if name == REGISTRY:
        return first.name in SEEN
    if name != "models":  # a name of somebody else's may have the form of theirs
        return True
    return first.suffix in (".gguf", ".json") and ID.fullmatch(first.stem) is not None


def mark_own(folder: Path) -> None:
    """Note that a folder is a device's, so that it stays known without its log and records.

    Raises
    ------
    OutputError
        The disk refused, and nothing else shows it.
    """
    if (folder / MARKER).is_file():
        return
    try:
        write_file(folder / MARKER, TEXT)
    except OutputError:
        if not is_own(folder):
            raise


def _taken(folder: Path) -> Iterator[str]:
    for name in (*CLEARED, *FILES):
        path = folder / name
        if path.is_dir():
            if any(not NOBODYS.fullmatch(one.name) for one in path.iterdir()):
                yield f"{name}/"
        elif os.path.lexists(path):
            yield name
    if any(os.path.lexists(folder / REGISTRY / name) for name in SEEN):
        yield f"{REGISTRY}/"


def _is_record(path: Path) -> bool:
    try:
        return read_record(read_object(path), path).id == path.stem
    except EdgemergeError:
        return False
