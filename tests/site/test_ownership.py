"""What is edgemerge's in a folder where somebody may have files too: nothing else is changed or removed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from edgemerge.errors import OutputError
from edgemerge.site import ownership
from edgemerge.site.folder import SiteFolder
from edgemerge.site.log import append_event
from edgemerge.site.ownership import is_own
from edgemerge.site.pruning import prune
from edgemerge.site.record import ModelRecord

FOREIGN: tuple[str, ...] = (
    "models/own.gguf",
    "models/own.json",
    "inputs/own.gguf",
    "inputs/base-final.gguf",
)
FOREIGN += (
    "work/thesis/text.tex",
    "work/own.gguf",
    "answers/own.json",
    "models/0123456789abcdef.gguf",
)


def write(path: Path, text: str = "own") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def add(site: SiteFolder, text: str) -> str:
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    name = sha256[:16]
    file = f"models/{name}.gguf"
    site.add(
        write(site.work / f"{name}.gguf", text),
        ModelRecord(name, file, sha256, len(text), "2026-01-01T00:00:00Z", (), "ties", {}),
    )
    return name


@pytest.mark.parametrize(
    "name",
    [*FOREIGN, "history", "log.jsonl", "trying.json", "hashes.json", "registry/root.json"],
)
def test_a_folder_with_files_of_somebody_else_is_not_taken(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / name, '{"loss": 0.5}\n')
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        OutputError, match=r"somebody else.* of its own.* file \.edgemerge-folder"
    ) as caught:
        SiteFolder(tmp_path).make()
    assert name.partition("/")[0] in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert file.read_text() == '{"loss": 0.5}\n'


def test_a_folder_with_other_files_and_empty_folders_is_taken(tmp_path: Path) -> None:
    write(tmp_path / "SITE.yml")
    write(tmp_path / "base.gguf")
    write(tmp_path / "registry" / "metadata" / "root.json")  # a registry that is published
    write(tmp_path / "models" / ".gitkeep")
    (tmp_path / "inputs" / "lost+found").mkdir(parents=True)
    (tmp_path / "work").mkdir()  # as a power cut leaves it
    assert not is_own(tmp_path)
    SiteFolder(tmp_path).make()
    assert is_own(tmp_path)
    write(tmp_path / "work" / "0123456789abcdef.gguf.part")
    SiteFolder(tmp_path).make()


def test_a_folder_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    site = SiteFolder(tmp_path)
    site.make()
    marker, log = tmp_path / ".edgemerge-folder", tmp_path / "log.jsonl"
    marker.unlink()
    site.promote(add(site, "1"), "better")
    site.make()
    assert marker.exists()
    marker.unlink()
    log.unlink()  # known by its records then
    site.make()
    marker.unlink()
    for path in site.models.glob("*.json"):
        path.unlink()
    for event in ("started", "failed"):
        append_event(log, {"event": event})
    log.write_bytes(log.read_bytes().splitlines(keepends=True)[1])  # its beginning went elsewhere
    site.make()
    log.unlink()
    site.make()
    marker.unlink()
    with pytest.raises(OutputError, match=r"has models/, .* of somebody else"):
        site.make()
    marker.touch()
    site.make()
    assert marker.read_bytes() == b""


def test_a_full_disk_does_not_stop_a_folder_of_an_earlier_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, raw: bytes) -> None:
        raise OutputError("no space is left", path=path)

    monkeypatch.setattr(ownership, "write_file", refuse)
    site = SiteFolder(tmp_path)
    with pytest.raises(OutputError, match="no space"):
        site.make()
    append_event(tmp_path / "log.jsonl", {"event": "started"})
    site.make()


def test_what_has_no_record_or_another_name_is_not_removed(tmp_path: Path) -> None:
    site = SiteFolder(tmp_path)
    site.make()
    for name in FOREIGN:
        write(tmp_path / name)
    names = [add(site, "x" * n) for n in (1, 2, 3)]
    for name in names:
        site.promote(name, "better")
    write(site.work / f"{'a' * 16}.gguf.part.journal")
    write(site.work / f"{'a' * 16}.gguf.stages" / "1.gguf")
    write(site.work / "page-x1y2" / "ward.gguf")
    write(site.inputs / "disease-1.2.delta.gguf")
    write(site.inputs / f"disease-1.3.gguf.{'a' * 16}.part")
    write(site.answers / f"{names[0]}-0123456789ab.json")
    assert prune(site, 1) == names[:1]
    site.clear_work()
    site.clear_inputs([])
    left = [one for one in tmp_path.rglob("*") if one.is_file() and one.parent != tmp_path]
    ours = [f"models/{name}.gguf" for name in names[1:]] + [f"models/{name}.json" for name in names]
    assert sorted(str(one.relative_to(tmp_path)) for one in left) == sorted([*FOREIGN, *ours])


def test_a_current_model_that_is_no_link_stays(tmp_path: Path) -> None:
    site = SiteFolder(tmp_path / "site")
    site.make()
    name = add(site, "1")
    write(site.current_path)
    for act in (site.make, lambda: site.promote(name, "better")):
        with pytest.raises(OutputError, match=r"current\.gguf: is no link"):
            act()
    assert site.current_path.read_text() == "own"
    site.current_path.unlink()
    site.promote(name, "better")
    assert os.readlink(site.current_path) == f"models/{name}.gguf"


def test_the_lock_leaves_a_file_of_its_name_as_it_is(tmp_path: Path) -> None:
    file = write(tmp_path / "lock")
    with SiteFolder(tmp_path).locked():
        pass
    assert file.read_text() == "own"


def test_a_damaged_history_is_passed_over(tmp_path: Path) -> None:
    site = SiteFolder(tmp_path / "site")
    site.make()
    one, two, three = (add(site, "x" * n) for n in (1, 2, 3))
    site.promote(one, "better")
    site.promote(two, "better")
    history = site.path / "history"
    history.write_bytes(history.read_bytes().replace(one[:4].encode(), b"\xff\x00\xfe\xff"))
    assert site.history() == [two]
    site.promote(three, "better")
    assert site.roll_back("worse") == two
