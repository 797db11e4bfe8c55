"""The panel of the Models tab that tells of the work beside the server, in Chromium."""

from __future__ import annotations

from typing import Any

import pytest

from tests.runtime.serve.page_stub import PageStub
from tests.runtime.serve.test_web_page import expect
from tests.support.models_tab import NEW, admin_answers, job, models_document


@pytest.fixture
def stub() -> Any:
    with PageStub() as stub:
        stub.admin = admin_answers()
        yield stub


def test_progress_is_told_and_its_end_outlives_a_reload(page: Any, stub: PageStub) -> None:
    stub.admin["/admin/models"] = models_document() | {"job": job()}
    stub.admin["/admin/job"] = {"job": job()}
    page.goto(f"{stub.url}#/models")
    bar, line = page.get_by_role("progressbar"), page.locator(".work .hint")
    expect(line).to_have_text("ties -> Third.gguf · 512 MiB of 2.00 GiB · 12 s")
    expect(bar).to_have_js_property("position", 0.25)
    voice = page.get_by_role("status").filter(has_text="25 %")
    expect(voice).to_have_text("ties -> Third.gguf, 25 %")
    stub.admin["/admin/job"] = {"job": job(done=1 << 30, seconds=24.0)}
    expect(line).to_have_text("ties -> Third.gguf · 1.00 GiB of 2.00 GiB · 24 s")
    page.reload()
    expect(bar).to_be_visible()
    result = {"model": NEW, "is_known": False, "out_bytes": 90 << 20, "peak_rss_bytes": 101 << 20}
    ended = job(state="done", seconds=30.0, result=result | {"notes": []})
    stub.admin["/admin/models"] = models_document() | {"job": ended}
    stub.admin["/admin/job"] = {"job": ended}
    for _ in range(2):
        expect(line).to_have_text("Done after 30 s: 90 MiB, memory 101 MiB at most.")
        expect(bar).to_be_hidden()
        page.reload()


def test_a_job_can_be_cancelled_and_a_failure_says_why(page: Any, stub: PageStub) -> None:
    running = job(kind="compare", title="x", stage=f"{NEW}: disease", unit="questions")
    running |= {"done": 3, "total": 40}
    stub.admin["/admin/models"] = models_document() | {"job": running}
    stub.admin["/admin/job"] = {"job": running}
    page.goto(f"{stub.url}#/models")
    line = page.locator(".work .hint")
    expect(line).to_have_text("Second: disease · 3 of 40 questions · 12 s")
    ended = running | {"state": "cancelled"}
    stub.admin["/admin/models"] = models_document() | {"job": ended}
    page.get_by_role("button", name="Cancel").click()
    expect(line).to_have_text("Cancelled after 12 s; nothing of it is left.")
    assert stub.changes == [("/admin/cancel", {"job": 3})]
    failed = running | {"state": "failed", "sentence": "the disk is full"}
    stub.admin["/admin/models"] = models_document() | {"job": failed}
    page.reload()
    expect(line).to_have_text("Failed after 12 s: the disk is full")


def test_the_end_of_a_job_is_told_whatever_else_fails(page: Any, stub: PageStub) -> None:
    stub.admin["/admin/models"] = models_document() | {"job": job()}
    stub.admin["/admin/job"] = {"job": job()}
    stub.admin["/admin/methods"] = (500, {"message": "not now"})
    page.goto(f"{stub.url}#/models")
    line, notice = page.locator(".work .hint"), page.get_by_role("alert").first
    expect(line).to_contain_text("512 MiB of 2.00 GiB")
    stub.admin["/admin/methods"] = admin_answers()["/admin/methods"]
    stub.admin["/admin/cancel"] = (409, {"message": "it has ended already"})
    ended = job(state="failed", sentence="the disk is full")
    stub.admin["/admin/models"] = models_document() | {"job": ended}
    page.get_by_role("button", name="Cancel").click()
    expect(line).to_have_text("Failed after 12 s: the disk is full")
    expect(notice).to_have_text("It has ended already.")
    stub.admin["/admin/models"] = models_document() | {"job": job()}
    page.reload()
    expect(line).to_contain_text("512 MiB of 2.00 GiB")
    stub.admin["/admin/models"] = (500, {"message": "not now"})
    stub.admin["/admin/job"] = {"job": ended}
    expect(line).to_have_text("Failed after 12 s: the disk is full")
    expect(notice).to_have_text("Not now.")
