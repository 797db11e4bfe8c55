"""Merges on the page, by its routes, against a real server and a device's folder."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from edgemerge.site.folder import SiteFolder
from edgemerge.site.record import ModelRecord, now
from tests.support.serving import Serving
from tests.support.site_models import N_QUESTIONS, make_merge_folder
from tests.support.tiny_gguf import write_tiny_gguf

pytestmark = pytest.mark.llama

KEY = "a-key-of-a-test"
PATIENCE = 90.0
WANTED: dict[str, Any] = {
    "method": "task_arithmetic",
    "base": "0/base.gguf",
    "models": [
        {"file": "0/expert-a.gguf", "parameters": {"weight": 0.6}},
        {"file": "0/delta-b.gguf", "parameters": {"weight": 0.4}},
    ],
    "parameters": {"lambda": 0.9},
    "type": "Q8_0",
}


@pytest.fixture(scope="module")
def folder(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_merge_folder(models_dir, tmp_path_factory.mktemp("files"))


def serve(folder: Path, site: Path, *more: object, key: str | None = KEY) -> Serving:
    arguments = ("--site", site, "--merge-from", folder, "--memory", "1GiB", *more)
    return Serving(*arguments, key=key)


def wait_for_job(server: Serving) -> dict[str, Any]:
    wait_until(lambda: server.get("/admin/job").json["job"]["state"] != "running")
    job: dict[str, Any] = server.get("/admin/job").json["job"]
    return job


def fingerprint(server: Serving) -> Any:
    return server.health()["models"][0]["fingerprint"]


def leave_after_asking(server: Serving, path: str, document: object) -> None:
    """Send a request, and hang up before its answer."""
    body = json.dumps(document).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + body)
        time.sleep(0.3)


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)


def make_record(file: Path, site: SiteFolder) -> str:
    """Put a file into a folder as if something had merged it; return its id."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    copy = site.work / "copy"
    shutil.copy(file, copy)
    settings = {"name": file.stem}
    record = ModelRecord(
        digest[:16], "x", digest, file.stat().st_size, now(), (), "linear", settings
    )
    site.add(copy, record)
    return record.id


def test_from_a_plan_to_a_rollback(folder: Path, tmp_path: Path) -> None:
    site = SiteFolder(tmp_path / "site")
    with serve(folder, site.path, f"ward={folder}/base.gguf") as server:
        before = fingerprint(server)
        told = server.get("/admin/models").json
        assert told["has_key"]
        (served,) = told["served"]
        assert (served["name"], served["file"], served["file_type"]) == ("ward", "base.gguf", "F32")
        assert served["signature"] is None
        assert {file["name"] for file in told["site"]["files"]} == {
            *("base", "expert-a", "delta-b", "disease", "general")
        }
        assert str(tmp_path) not in json.dumps(told)

        plan = server.post("/admin/plan", WANTED).json
        assert plan["file_type"] == "Q8_0"
        assert 0 < plan["needed_bytes"] <= plan["budget_bytes"] <= 512 << 20
        assert plan["written_bytes"] > 3_000_000
        assert (plan["basis"], plan["seconds"] > 0) == ("disk", True)
        assert server.post("/admin/plan", {**WANTED, "base": None}).status == 400
        again = server.post("/admin/plan", {**WANTED, "models": WANTED["models"][:1] * 2})
        assert "taken twice" in again.error["message"]

        begun = server.post("/admin/merge", {**WANTED, "name": "Ward 1"})
        assert begun.json["job"]["state"] == "running"
        assert server.post("/admin/merge", {**WANTED, "name": "Ward 2"}).status == 409
        job = wait_for_job(server)
        assert job["state"] == "done", job
        model = job["result"]["model"]
        assert list(site.work.iterdir()) == []
        record = site.record(model)
        assert [(part.name, part.role) for part in record.made_of] == [
            ("base", "base"),
            ("expert-a", "expert"),
            ("delta-b", "delta"),
        ]
        assert record.settings["parameters"] == {"lambda": 0.9}
        assert record.bytes == site.model_path(model).stat().st_size == job["result"]["out_bytes"]
        assert server.post("/admin/plan", WANTED).json["basis"] == "method"
        taken = server.post("/admin/merge", {**WANTED, "name": "Ward 1"})
        assert (taken.status, "already" in taken.error["message"]) == (409, True)

        questions = {"model": model, "questions": ["0/disease.jsonl", "0/general.jsonl"]}
        assert server.post("/admin/compare", questions).status == 200
        job = wait_for_job(server)
        assert job["state"] == "done", job
        for row in job["result"]["tasks"]:
            assert row["n"] == N_QUESTIONS
            assert row["low"] <= row["difference"] <= row["high"]
            assert row["right"][1] - row["right"][0] == row["only"][1] - row["only"][0]
            assert site.record(model).scores[row["task"]].right == row["right"][1]

        assert server.post("/admin/promote", {"model": model}).status == 200
        assert site.current_id() == model
        after = fingerprint(server)
        assert after != before
        assert server.get("/admin/models").json["served"][0]["id"] == model
        assert server.post("/admin/compare", questions).status == 409
        server.stop()
        server.wait()
    with serve(folder, site.path) as server:  # the folder says what is served
        assert fingerprint(server) == after
        assert server.health()["models"][0]["id"] == "site"
        assert server.post("/admin/rollback", {}).status == 200
        assert fingerprint(server) == before
        assert site.record(model).decision == "rolled_back"
        assert server.post("/admin/rollback", {}).status == 409
        told = server.get("/admin/models").json["site"]
        events = [event["event"] for event in told["log"]]
        assert events == ["merged", "compared", "promoted", "promoted", "rolled_back"]
        compared = {one["name"]: one["compared"] for one in told["models"]}
        assert [task["task"] for task in compared["Ward 1"]["tasks"]] == ["disease", "general"]
        assert compared["base"] is None


def test_a_cancelled_merge_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    site = SiteFolder(tmp_path / "site")
    with serve(folder, site.path, folder / "base.gguf") as server:
        job = server.post("/admin/merge", {**WANTED, "name": "x"}).json["job"]
        time.sleep(0.5)
        answer = server.post("/admin/cancel", {"job": job["id"]})
        assert answer.json["job"]["state"] == "cancelled"
        assert server.post("/admin/cancel", {"job": job["id"]}).status == 409
        assert [*site.work.iterdir(), *site.models.iterdir()] == []
        with site.locked():  # as an update does
            server.post("/admin/merge", {**WANTED, "name": "x"})
            job = wait_for_job(server)
            assert job["state"] == "failed"
            assert "another update is at work" in job["sentence"]
        server.post("/admin/merge", {**WANTED, "name": "x"})
        time.sleep(0.5)
        server.process.kill()
        server.wait()
    # the child ends by itself
    wait_until(lambda: not any(str(site.work) in line for line in command_lines()))
    with serve(folder, site.path, folder / "base.gguf"):
        assert [*site.work.iterdir(), *site.models.iterdir()] == []


def command_lines() -> list[str]:
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_text().replace("\0", " "))
        except OSError:
            continue
    return lines


def test_what_answers_badly_is_not_promoted(folder: Path, tmp_path: Path) -> None:
    site = SiteFolder(tmp_path / "site")
    with serve(folder, site.path, folder / "base.gguf") as server:
        (tmp_path / "broken.gguf").write_bytes((folder / "expert-a.gguf").read_bytes()[:9000])
        broken = make_record(tmp_path / "broken.gguf", site)
        before = fingerprint(server)
        answer = server.post("/admin/promote", {"model": broken})
        assert (answer.status, answer.error["code"]) == (409, "model_refused")
        assert fingerprint(server) == before
        assert site.current_id() != broken
        other = make_record(folder / "expert-a.gguf", site)
        with site.locked():
            answer = server.post("/admin/promote", {"model": other})
            assert (answer.status, "another update" in answer.error["message"]) == (409, True)
        assert server.post("/admin/promote", {"model": "0" * 16}).status == 404
        leave_after_asking(server, "/admin/promote", {"model": other})
        wait_until(lambda: site.current_id() == other and fingerprint(server) != before)
        (site.models / f"{broken}.json").write_text("{}")
        told = server.get("/admin/models").json["site"]
        assert {one["name"] for one in told["models"]} == {"base", "expert-a"}


def test_the_model_before_need_not_answer_well(folder: Path, tmp_path: Path) -> None:
    silent = write_tiny_gguf(tmp_path / "silent.gguf")
    reader: Any = gguf.GGUFReader(silent, "r+")
    for tensor in reader.tensors:
        tensor.data[...] = 0
    del reader
    site = SiteFolder(tmp_path / "site")
    with serve(folder, site.path, silent) as server:
        before = fingerprint(server)
        other = make_record(folder / "expert-a.gguf", site)
        assert server.post("/admin/promote", {"model": other}).status == 200
        assert server.post("/admin/rollback", {}).status == 200
        assert fingerprint(server) == before
        assert site.record(other).decision == "rolled_back"


CHANGES = ("plan", "merge", "compare", "cancel", "promote", "rollback")


@pytest.mark.parametrize("key", [None, KEY])
def test_nothing_changes_without_the_key(key: str | None, tmp_path: Path) -> None:
    site = SiteFolder(tmp_path / "site")
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf")
    with Serving(tiny, "--site", site.path, key=key) as server:
        told = server.get("/admin/models")
        assert (told.status, told.json["has_key"]) == (200, key is not None)
        assert server.get("/admin/methods").json["types"][0] == "keep"
        status, code = (403, "no_key") if key is None else (401, "invalid_api_key")
        for name in CHANGES:
            answer = server.post(f"/admin/{name}", {}, Authorization="Bearer wrong")
            assert (answer.status, answer.error["code"]) == (status, code)
            foreign = server.post(f"/admin/{name}", {}, Origin="http://evil.example")
            assert (foreign.status, foreign.error["code"]) == (403, "wrong_origin")
        if key is not None:
            server.key = None
            for path in ("models", "job", "methods"):
                assert server.get(f"/admin/{path}").status == 401
        assert {path.name for path in site.path.iterdir()} == {
            "models",
            "inputs",
            "work",
            "answers",
            ".edgemerge-folder",
        }


def test_without_a_folder_the_tab_only_tells(tmp_path: Path) -> None:
    with Serving(write_tiny_gguf(tmp_path / "tiny.gguf"), key=KEY) as server:
        told = server.get("/admin/models").json
        assert (told["served"][0]["title"], told["site"], told["job"]) == ("tiny", None, None)
        for name in CHANGES:
            assert server.post(f"/admin/{name}", {}).status == 404
