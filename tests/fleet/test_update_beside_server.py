"""An update beside a server that SITE.yml names wrongly: no model is to blame for that."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from typer.testing import CliRunner

from edgemerge.cli import make_app
from edgemerge.fleet.report import Report
from edgemerge.fleet.server import Server
from edgemerge.fleet.site_file import read_site
from edgemerge.fleet.switch import NO_SERVER
from edgemerge.fleet.watch import Baseline, watch_server
from edgemerge.runtime.model_files import find_fingerprint
from edgemerge.site.log import read_events
from tests.support.updates import (
    KnowingExaminer,
    better,
    folder_of,
    update,
    write_site,
)

MODEL = {"id": "ward", "crashes": 0}
NO_ROOM = {"message": "no room for the model", "type": "server_busy", "code": "model_unavailable"}
GONE = {"message": "it has ended", "type": "server_error", "code": "model_unavailable"}
PAGE = b"<html>Bad gateway</html>"
GATEWAYS = [(502, PAGE), (503, PAGE), (503, b'{"message": "no healthy upstream"}')]


@dataclass
class Told:
    """What the server answers: a status and a document for each path; and the paths that were asked.

    With `serves`, it has loaded that file, and loads it again by a reload that works. With `dies`, a reload
    brings it down: from then on a proxy answers all with `gone`.
    """

    health: dict[str, Any] = field(default_factory=lambda: {"status": "ok", "models": [MODEL]})
    reload: tuple[int, Any] = (200, {"id": "ward"})
    busy: tuple[int, Any] | None = None
    asked: list[str] = field(default_factory=list)
    url: str = ""
    serves: Path | None = None
    dies: tuple[int, bytes] | None = None
    gone: tuple[int, bytes] | None = None

    def load(self) -> None:
        if self.serves is not None:
            model = MODEL | {"fingerprint": find_fingerprint([self.serves])}
            self.health = {"status": "ok", "models": [model]}


@pytest.fixture
def told() -> Iterator[Told]:
    """A server of one thread that answers as the test says."""
    told = Told()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200, told.health)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            if "reload" in self.path:
                told.gone = told.dies
                if told.reload[0] == 200:
                    told.load()
            choice = {"choices": [{"text": "Paris."}], "usage": {"completion_tokens": 2}}
            answer = told.busy or (200, choice)
            self._answer(*(told.reload if "reload" in self.path else answer))

        def _answer(self, status: int, document: Any) -> None:
            told.asked.append(self.path)
            status, document = told.gone or (status, document)
            raw = document if isinstance(document, bytes) else json.dumps(document).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        told.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield told
        server.shutdown()
        thread.join()


def run(
    path: Path,
    told: Told,
    expert: str = "a",
    *,
    again: bool = False,
    place: Mapping[str, str] = MappingProxyType({}),
    problems: Sequence[str | None] = (),
) -> Report:
    write_site(
        path.parent,
        experts=[{"path": f"{expert}.gguf"}],
        serve={"address": told.url, **place},
        promote={"watch": 0, "better": [], "slowdown": 100},
    )
    server = Server(read_site(path).serve)  # type: ignore[arg-type]
    examiner = KnowingExaminer(better, problems=list(problems))
    return update(path, examiner, server=server, again=again)


@pytest.mark.parametrize(
    ("health", "place", "says"),
    [
        ({"status": "ok"}, {}, "does not take the key; correct serve.key"),
        ({"models": [MODEL]}, {"model": "wards"}, "did you mean 'ward'?"),
    ],
)
def test_a_wrong_key_or_name_is_told_before_anything_is_made(
    device: Path, told: Told, health: dict[str, Any], place: dict[str, str], says: str
) -> None:
    assert run(device, told).outcome == "promoted"
    right, told.health = told.health, health
    for _ in range(2):  # not settled: it is told until somebody corrects it
        report = run(device, told, "b", place=place)
        assert (report.outcome, report.tried) == ("failed", None)
        assert says in report.reason
    told.health = right
    assert run(device, told, "b").outcome == "promoted"


def test_a_key_that_is_changed_meanwhile_costs_no_model(device: Path, told: Told) -> None:
    assert run(device, told).outcome == "promoted"
    taken, told.reload = told.reload, (401, {"error": {"message": "the API key is wrong"}})
    report = run(device, told, "b")
    assert report.outcome == "failed"
    assert report.reason == "the server says: the API key is wrong (401)"
    told.reload = taken
    again = run(device, told, "b")
    assert again.outcome == "promoted"
    assert again.current is not None
    assert again.current.made_of[1].name == "b.gguf"


def test_a_server_that_refuses_the_model_itself_has_it_rolled_back(
    device: Path, told: Told
) -> None:
    first = run(device, told).current
    told.reload = (409, {"error": {"message": "the new model repeats itself"}})
    report = run(device, told, "b")
    assert (report.outcome, report.current) == ("rolled_back", first)
    assert folder_of(device).current() == first


def test_a_roll_back_that_the_server_does_not_take_fails(device: Path, told: Told) -> None:
    first = run(device, told).current
    run(device, told, "b")
    taken, told.reload = told.reload, (401, {"error": {"message": "the API key is wrong"}})
    result = CliRunner().invoke(make_app(), ["rollback", str(device)])
    assert result.exit_code == 1
    assert "the server did not take the earlier model" in result.stderr
    assert folder_of(device).current() == first  # which serves after a restart
    told.reload = taken
    assert run(device, told).outcome == "unchanged"


def test_a_server_of_something_else_is_told(device: Path, told: Told) -> None:
    told.health = {"models": "many"}
    report = run(device, told)
    assert report.outcome == "failed"
    assert folder_of(device).current() is None


def test_a_server_of_another_file_is_found_before_anything_is_made(
    device: Path, told: Told
) -> None:
    first = run(device, told).current
    current = folder_of(device).current_path
    told.serves = device.parent / "a.gguf"
    told.load()
    says = (
        f"the server at {told.url} serves another file than {current}, or adds an adapter to it; "
        f"start it with edgemerge serve {current}"
    )
    for expert in ("a", "b"):  # where nothing changed, too
        report = run(device, told, expert)
        assert (report.outcome, report.reason, report.tried) == ("failed", says, None)
    assert folder_of(device).current() == first
    told.serves = current
    told.load()
    assert run(device, told, "b").outcome == "promoted"


@pytest.mark.parametrize("is_busy", [False, True])
def test_a_promotion_that_the_server_does_not_follow_is_rolled_back(
    device: Path, told: Told, is_busy: bool
) -> None:
    first = run(device, told).current
    told.busy = (503, {}) if is_busy else None
    told.serves = device.parent / "a.gguf"  # it shows by the reload
    report = run(device, told, "b")
    assert (report.outcome, report.current) == ("rolled_back", first)
    assert f"another file than {folder_of(device).current_path}" in report.reason
    assert report.reason.endswith(", then run edgemerge update --again")
    assert report.server_differs
    assert "did not take the earlier model" in report.failures[0]


def test_a_first_promotion_beside_a_server_of_another_file_fails(device: Path, told: Told) -> None:
    told.serves = device.parent / "base.gguf"
    told.load()
    report = run(device, told)
    assert report.outcome == "failed"
    assert "serves another file" in report.reason
    assert "no earlier model to roll back to" in report.reason
    told.serves = folder_of(device).current_path
    told.load()
    report = run(device, told, again=True)
    assert (report.outcome, report.reason) == (
        "unchanged",
        "the merge gives the model that serves",
    )


def test_a_server_that_missed_a_reload_is_told_again(device: Path, told: Told) -> None:
    run(device, told)
    told.serves = device.parent / "a.gguf"
    told.load()  # as it was, and since then its link leads to the model of now
    told.serves = folder_of(device).current_path
    assert run(device, told).outcome == "unchanged"
    assert Server(read_site(device).serve).find_difference(told.serves) is None  # type: ignore[arg-type]
    events = [one["event"] for one in read_events(folder_of(device).path / "log.jsonl")]
    assert events[-2:] == ["reloaded", "unchanged"]


def test_a_server_that_cannot_load_the_model_of_now_does_not_stop_the_next(
    device: Path, told: Told
) -> None:
    run(device, told)
    told.serves = device.parent / "a.gguf"
    told.load()
    told.reload = (409, {"error": {"message": "it does not load"}})
    report = run(device, told)
    assert report.outcome == "unchanged"
    assert "does not take the model of now" in report.failures[0]


@pytest.fixture
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgemerge.fleet.server.ROOM_SECONDS", 0.0)


@pytest.mark.usefixtures("no_wait")
@pytest.mark.parametrize(
    ("refusal", "says"),
    [
        ((503, {"error": NO_ROOM}), "the server says: no room for the model (503)"),
        ((503, b"Service Unavailable"), "does not answer at the moment (503)"),
        ((502, PAGE), "does not answer at the moment (502)"),
        ((504, PAGE), "does not answer at the moment (504)"),
    ],
)
def test_a_server_that_is_busy_costs_no_model(
    device: Path, told: Told, refusal: tuple[int, Any], says: str
) -> None:
    first = run(device, told).current
    told.serves = folder_of(device).current_path
    told.load()  # and goes on with that
    taken, told.reload = told.reload, refusal
    for _ in range(2):  # not settled
        report = run(device, told, "b")
        assert report.outcome == "failed"
        assert report.reason.endswith(f"{says}; the next update goes on from here")
    told.reload = taken
    report = run(device, told, "b")
    assert report.outcome == "promoted"
    assert report.current == folder_of(device).current() != first


@pytest.mark.usefixtures("no_wait")
@pytest.mark.parametrize("page", GATEWAYS)
def test_a_model_that_brings_down_a_server_behind_a_proxy_is_rolled_back(
    device: Path, told: Told, page: tuple[int, bytes]
) -> None:
    first = run(device, told).current
    told.dies = page
    report = run(device, told, "b", problems=[None, None, "llama.cpp crashed"])
    assert (report.outcome, report.current) == ("rolled_back", first)
    assert report.reason == "it cannot be asked the smoke question (llama.cpp crashed)"
    assert report.failures == [NO_SERVER] * 2  # by the promotion, and by the roll back
    assert run(device, told, "b").outcome == "unchanged"


@pytest.mark.usefixtures("no_wait")
def test_a_server_behind_a_proxy_may_be_switched_off(device: Path, told: Told) -> None:
    run(device, told)
    told.gone = told.dies = (502, PAGE)
    report = run(device, told, "b")
    assert (report.outcome, report.failures[-1]) == ("promoted", NO_SERVER)


@pytest.mark.usefixtures("no_wait")
def test_a_server_that_took_the_model_by_a_new_start_needs_no_room_for_both(
    device: Path, told: Told
) -> None:
    run(device, told)
    told.reload = (503, {"error": NO_ROOM})
    assert run(device, told, "b").outcome == "failed"
    told.serves = folder_of(device).current_path
    told.load()
    assert run(device, told, "b").outcome == "promoted"


def test_a_server_that_has_room_soon_is_told_again(
    device: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(device, told)
    taken, told.reload = told.reload, (503, {"error": NO_ROOM})
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            told.reload = taken

    monkeypatch.setattr("edgemerge.fleet.server.time.sleep", wait)
    assert run(device, told, "b").outcome == "promoted"
    assert waits == [5.0, 5.0]


@pytest.mark.parametrize(
    ("refusal", "fault"),
    [
        ((503, {"error": NO_ROOM}), None),
        ((503, b"Service Unavailable"), None),
        ((503, {"error": GONE}), "it does not answer: the server says: it has ended (503)"),
        ((502, PAGE), "it does not answer: the server at"),
    ],
)
def test_a_model_is_not_at_fault_while_its_server_is_busy(
    device: Path, told: Told, refusal: tuple[int, Any], fault: str | None
) -> None:
    run(device, told)
    told.busy = refusal
    found = watch(device, lambda _: None)
    assert found is None if fault is None else str(found).startswith(fault)


def watch(device: Path, wait: Callable[[float], None]) -> str | None:
    site = read_site(device)
    return watch_server(
        Server(site.serve),  # type: ignore[arg-type]
        folder_of(device).current_path,
        replace(site.rule, watch=0.2),
        Baseline(0, None),
        wait=wait,
    )


@pytest.mark.parametrize("page", GATEWAYS)
@pytest.mark.parametrize("comes_back", [False, True])
def test_a_server_that_a_proxy_has_lost_while_it_is_watched_has_to_come_back(
    device: Path, told: Told, page: tuple[int, bytes], comes_back: bool
) -> None:
    run(device, told)
    n_waits = 0

    def wait(_: float) -> None:
        nonlocal n_waits
        n_waits += 1
        may_be_full = page[0] == 503  # of uvicorn's connections, for as long as it is watched
        told.gone = page if not comes_back or (n_waits < 4 and may_be_full) else None

    found = watch(device, wait)
    if comes_back:
        assert found is None
    else:
        says = f"the server at {told.url} does not answer at the moment ({page[0]})"
        assert found == f"it does not answer: {says}"
