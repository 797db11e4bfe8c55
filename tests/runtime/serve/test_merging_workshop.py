"""What the Models tab does while others change the folder, with commands that do as they are told."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from edgemerge.errors import OutputError
from edgemerge.output.file import OutputFile
from edgemerge.runtime.serve.errors import Refusal
from edgemerge.runtime.serve.merging import workshop as workshop_module
from edgemerge.runtime.serve.merging.choices import MergeRequest, read_request
from edgemerge.runtime.serve.merging.job import Job
from edgemerge.runtime.serve.merging.workshop import Workshop
from edgemerge.runtime.serve.models import read_model_file
from edgemerge.runtime.serve.reload import Reloader
from edgemerge.runtime.serve.store import ModelStore
from edgemerge.site.folder import SiteFolder
from edgemerge.site.record import ModelRecord
from tests.runtime.serve.test_merging_server import make_record
from tests.support import tiny_gguf
from tests.support.fake_process import Loader, keep


def make_workshop(folder: Path, start: Path) -> Workshop:
    """Make one whose server began with a file."""
    file = read_model_file(start, name="ward")
    models = ModelStore([file], Loader(), keep, budget=1 << 40, floor=0)
    site = SiteFolder(folder / "site")
    return Workshop(site, [folder], models, Reloader(models))


async def end_of(job: Job) -> str:
    async with asyncio.timeout(20):
        while job.state == "running":
            await asyncio.sleep(0.01)
    return job.state


def test_a_comparison_is_of_the_models_that_were_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = SiteFolder(tmp_path / "site")
    site.make()
    ids: list[str] = []
    for name, n_ctx in (("old", 128), ("new", 256), ("later", 256)):
        monkeypatch.setattr(tiny_gguf, "CONTEXT", n_ctx)
        file = tiny_gguf.write_tiny_gguf(tmp_path / f"{name}.gguf", seed=len(ids))
        ids.append(make_record(file, site))
    old, new, later = ids
    site.promote(old, "it was first")
    question = '{"question": "x", "options": ["a", "b"], "answer": 0}'
    (tmp_path / "ward.jsonl").write_text(question)
    given: list[str] = []

    async def ask(arguments: Sequence[str], _look: object) -> dict[str, Any]:
        given.extend(arguments)
        site.promote(later, "an update found it better")
        asked = zip(arguments[1:3], (0.5, 0.75), strict=True)
        rows = [{"model": model, "task": "ward", "acc": acc, "n": 4} for model, acc in asked]
        pair = {"task": "ward", "only_first": 0, "only_second": 1, "difference": 0.25, "p": 1.0}
        return {"results": rows, "comparisons": [pair]}

    monkeypatch.setattr(workshop_module, "run_command", ask)

    async def scenario() -> None:
        workshop = make_workshop(tmp_path, site.current_path)
        job = workshop.compare(new, ["0/ward.jsonl"])
        assert await end_of(job) == "done", job.sentence
        assert job.result is not None
        assert job.result["note"] == ""

    asyncio.run(scenario())
    assert given[given.index("--ctx") + 1] == "128"  # neither reads further
    right = {name: {task: s.right for task, s in site.record(name).scores.items()} for name in ids}
    assert right == {old: {"ward": 2}, new: {"ward": 3}, later: {}}
    assert site.last_log(1)[0]["with"] == old


def test_a_model_that_is_here_is_told_of_though_its_merge_was_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = tiny_gguf.write_tiny_gguf(tmp_path / "start.gguf")
    is_adding, may_add = threading.Event(), threading.Event()

    async def merge(arguments: Sequence[str], _look: object) -> dict[str, Any]:
        Path(arguments[arguments.index("-o") + 1]).write_bytes(start.read_bytes())
        sizes = dict.fromkeys(("out_bytes", "read_bytes", "peak_rss_bytes"), 1)
        return {"sha256": "a" * 64, "notes": [], **sizes}

    def add(site: SiteFolder, file: Path, record: ModelRecord) -> None:
        is_adding.set()
        assert may_add.wait(20)
        add_at_once(site, file, record)

    add_at_once = SiteFolder.add
    monkeypatch.setattr(SiteFolder, "add", add)
    monkeypatch.setattr(workshop_module, "run_command", merge)

    async def scenario() -> None:
        workshop = make_workshop(tmp_path, start)
        models = [{"file": "0/start.gguf", "parameters": {"weight": 1}}]
        document = {"method": "linear", "models": models, "name": "x"}
        asked = MergeRequest.model_validate(document)
        job = workshop.merge(asked, read_request(asked, workshop.offers))
        await asyncio.to_thread(is_adding.wait, 20)
        cancelling = asyncio.create_task(workshop.jobs.cancel(job.id))
        await asyncio.sleep(0.1)
        may_add.set()
        await cancelling
        assert job.state == "done", job.sentence
        site = workshop.site
        assert site.has_model("a" * 16)
        assert [event["event"] for event in site.last_log(9)] == ["merged"]
        assert list(site.work.iterdir()) == []

    asyncio.run(scenario())


def test_what_another_server_makes_stays(tmp_path: Path) -> None:
    """Fault: a second server on one folder removed what a merge of the first was writing."""
    start = tiny_gguf.write_tiny_gguf(tmp_path / "start.gguf")
    site = SiteFolder(tmp_path / "site")
    site.make()
    made = site.work / "page-x"
    made.mkdir()
    with site.locked():  # as a merge is
        workshop = make_workshop(tmp_path, start)
        workshop.tidy()
        assert made.exists()
    workshop.tidy()
    assert list(site.work.iterdir()) == []


def test_the_first_model_stays_as_it_was_whoever_writes_over_its_file(tmp_path: Path) -> None:
    """Fault: the folder had a hard link to the file, and rolled back to what was written into it."""
    start = tiny_gguf.write_tiny_gguf(tmp_path / "start.gguf")
    before = start.read_bytes()
    site = SiteFolder(tmp_path / "site")
    site.make()
    new = make_record(tiny_gguf.write_tiny_gguf(tmp_path / "new.gguf", seed=1), site)

    async def scenario() -> None:
        workshop = make_workshop(tmp_path, start)
        await workshop.promote(new)
        start.write_bytes(b"something else")  # as cp does, or wget -O
        await workshop.roll_back()

    asyncio.run(scenario())
    first = site.current_id()
    assert first is not None
    assert first == hashlib.sha256(before).hexdigest()[:16]
    assert site.model_path(first).read_bytes() == before
    assert list(site.work.iterdir()) == []


def test_a_disk_without_room_for_the_first_model_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = tiny_gguf.write_tiny_gguf(tmp_path / "start.gguf")
    site = SiteFolder(tmp_path / "site")
    site.make()
    new = make_record(tiny_gguf.write_tiny_gguf(tmp_path / "new.gguf", seed=1), site)

    def refuse(file: OutputFile) -> None:
        raise OutputError("needs 4 GB and the disk lacks 1 GB of it", path=file.path)

    monkeypatch.setattr(OutputFile, "reserve", refuse)

    async def scenario() -> None:
        workshop = make_workshop(tmp_path, start)
        with pytest.raises(Refusal, match=r"cannot be copied, which .* the disk lacks 1 GB"):
            await workshop.promote(new)

    asyncio.run(scenario())
    assert site.current_id() is None
    assert list(site.work.iterdir()) == []
