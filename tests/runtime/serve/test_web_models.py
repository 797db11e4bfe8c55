"""The Models tab in Chromium, against a server that does as it is told (and, below, the real one)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from edgemerge.site.folder import SiteFolder
from tests.runtime.serve.page_stub import PageStub
from tests.runtime.serve.test_web_page import EVIL, expect
from tests.support.models_tab import NEW, OLD, PLAN, admin_answers, file, job, models_document
from tests.support.serving import Serving
from tests.support.site_models import make_merge_folder

BASE = re.compile("^base ")


@pytest.fixture
def stub() -> Any:
    with PageStub() as stub:
        stub.admin = admin_answers()
        yield stub


def open_tab(page: Any, stub: PageStub) -> None:
    page.goto(stub.url)
    page.get_by_role("link", name="Models").click()
    expect(page.get_by_role("heading", name="Served")).to_be_visible()


def card(page: Any, name: str) -> Any:
    return page.locator(".card", has=page.get_by_role("heading", name=name))


def test_what_is_served_what_it_was_made_of_who_signed_it_its_scores(
    page: Any, stub: PageStub
) -> None:
    open_tab(page, stub)
    served = card(page, "ward")
    expect(served).to_contain_text("llama, Q4_K_M, 135 million parameters, 90 MiB")
    expect(served).to_contain_text("ties of base, ward a")
    expect(served).to_contain_text("by the key 4fd14fd14fd14fd1…, checked when it was loaded")
    expect(served).to_contain_text("disease 45.0 % of 200")
    first = card(page, "First")
    expect(first).to_contain_text("what it was made of: by the clinic")
    expect(first.locator(".mark")).to_have_text("serves")
    expect(page.get_by_role("heading", name="Refused")).to_have_count(0)
    second = card(page, "Second")
    lines = second.locator(".compared li")
    expect(lines).to_have_count(3)
    expect(lines.nth(0)).to_contain_text("disease: better55.0 % instead of 45.0 % of 200 questions")
    expect(lines.nth(0)).to_contain_text("+10.0 points, 95 % interval +4.0 to +16.0")
    expect(lines.nth(0)).to_contain_text("right alone 30 : 10, McNemar p 0.002")
    expect(lines.nth(1)).to_contain_text("general: worse")
    expect(lines.nth(1)).to_contain_text(
        "\N{MINUS SIGN}10.0 points, 95 % interval \N{MINUS SIGN}16.0 to \N{MINUS SIGN}4.0"
    )
    expect(lines.nth(1)).to_contain_text("p < 0.001")
    expect(lines.nth(2)).to_contain_text("dose: no sure difference")
    page.get_by_text("What was done").click()
    expect(page.locator(".log li").first).to_contain_text("First was promoted: because")
    page.get_by_role("link", name="Chat").click()
    expect(page.get_by_label("Message", exact=True)).to_be_visible()
    expect(page.get_by_role("heading", name="Served")).to_be_hidden()


def test_text_of_models_and_files_is_text(page: Any, stub: PageStub) -> None:
    document = models_document()
    for one in (document["served"][0], *document["site"]["models"], *document["site"]["files"]):
        one["name"] = EVIL
    document["site"]["names"] = {OLD: EVIL, NEW: EVIL}
    document["job"] = job(title=EVIL, stage=EVIL)
    stub.admin |= {"/admin/models": document, "/admin/plan": PLAN | {"notes": [EVIL]}}
    stub.admin["/admin/job"] = {"job": document["job"]}
    open_tab(page, stub)
    ask = page.get_by_role("button", name="Show the plan")
    expect(ask).to_be_visible()  # the form comes after the rest, and has the last checkbox
    page.get_by_role("checkbox").last.check()
    ask.click()
    expect(page.locator(".plan")).to_contain_text("<img src=x")
    expect(page.locator(".work h2")).to_contain_text("<img src=x")
    assert page.title() == "edgemerge"
    assert page.locator("#workshop img").count() == 0


def test_the_key_is_asked_for_where_the_reader_is(page: Any, stub: PageStub) -> None:
    stub.key = "s3cret"
    page.goto(f"{stub.url}#/models")
    expect(page.get_by_label("This server asks for a key.")).to_be_focused()
    page.keyboard.type("s3cret")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Merge", exact=True)).to_be_visible()  # all is there
    stub.key = "changed"
    page.get_by_role("button", name="Promote: Second").click()
    page.get_by_label("The server does not accept this key.").fill("changed")
    page.get_by_role("link", name="Chat").click()
    page.keyboard.press("Tab")
    page.get_by_role("button", name="Unlock").click()
    expect(page.locator("#unlock")).to_be_hidden()
    page.reload()
    expect(page.locator("#memory dd")).to_contain_text("MiB of")


def test_a_refusal_of_before_the_key_is_no_refusal_of_it(page: Any, stub: PageStub) -> None:
    """Fault: it asked for the key again, and nothing came."""
    held = list[Any]()

    def hold_the_first(route: Any) -> None:
        held.append(route)
        if len(held) > 1:
            route.continue_()

    page.route("**/admin/models", hold_the_first)
    stub.key = "s3cret"
    page.goto(f"{stub.url}#/models")
    expect(page.get_by_label("This server asks for a key.")).to_be_focused()
    page.keyboard.type("s3cret")
    page.keyboard.press("Enter")
    expect(page.locator("#unlock")).to_be_hidden()
    n_held = len(held)
    held[0].fulfill(status=401, json={"error": {"message": "wrong key"}})
    page.wait_for_function("() => !document.querySelector('#workshop').hidden")
    expect(page.get_by_role("heading", name="Merge", exact=True)).to_be_visible()
    expect(page.locator("#unlock")).to_be_hidden()
    assert len(held) > n_held  # it was asked once more


def test_a_key_that_changes_meanwhile_is_asked_for(page: Any, stub: PageStub) -> None:
    refusal = {"error": {"message": "wrong key"}}
    page.route("**/admin/methods", lambda route: route.fulfill(status=401, json=refusal))
    page.goto(f"{stub.url}#/models")
    expect(page.locator("#unlock")).to_be_visible()


def test_it_comes_when_the_server_answers_again(page: Any, stub: PageStub) -> None:
    stub.torn = True
    page.goto(f"{stub.url}#/models")
    expect(page.locator("#offline")).to_be_visible()
    stub.torn = False
    expect(page.locator("#offline")).to_be_hidden()
    expect(page.get_by_role("heading", name="Merge", exact=True)).to_be_visible()


@pytest.mark.parametrize("has_key", [False, True])
def test_without_key_or_folder_it_says_what_to_do(page: Any, stub: PageStub, has_key: bool) -> None:
    document = models_document() | {"has_key": has_key}
    if has_key:
        document["site"] = None
    stub.admin["/admin/models"] = document
    open_tab(page, stub)
    expect(card(page, "ward")).to_be_visible()
    said = "start the server with --site DIR" if has_key else "EDGEMERGE_API_KEY="
    expect(page.locator("#workshop")).to_contain_text(said)
    expect(page.locator("#workshop button:visible")).to_have_count(0)


def test_a_merge_is_set_up_planned_and_begun(page: Any, stub: PageStub) -> None:
    open_tab(page, stub)
    page.get_by_role("button", name="Show the plan").click()
    expect(page.get_by_role("alert").first).to_contain_text("Choose at least 1 of the models")
    expect(page.get_by_role("checkbox", name=BASE)).to_have_count(0)  # it is the base
    page.get_by_role("checkbox", name="ward a").check()
    page.get_by_role("checkbox", name="ward b delta of base, 90 MiB").check()
    slider = page.get_by_label("weight of ward a, slider")
    slider.fill("0.6")
    number = page.get_by_label("weight of ward a", exact=True)
    expect(number).to_have_value("0.6")
    number.fill("3.5")  # beyond what the slider shows
    expect(slider).to_have_value("2")
    page.get_by_label("density of ward b", exact=True).fill("0.5")
    page.get_by_label("lambda", exact=True).fill("0.9")
    page.locator(".numbers summary").click()
    page.get_by_label("rescale").select_option("l1")
    page.get_by_label("normalize").uncheck()
    page.get_by_label("Type of the output").select_option("Q4_K_M")
    merge = page.get_by_role("button", name="Merge", exact=True)
    expect(merge).to_be_disabled()
    page.get_by_role("button", name="Show the plan").click()
    plan = page.locator(".plan")
    expect(plan).to_contain_text("100 MiB of 512 MiB beside the server")
    expect(plan).to_contain_text("about 2 min, as merges by this method took here")
    expect(plan).to_contain_text("3.00 GiB, in 2 passes")
    expect(plan).to_contain_text("90 MiB (Q4_K_M), 7.00 GiB are free")
    expect(plan).to_contain_text("the tokenizer is the base's")
    page.get_by_label("lambda", exact=True).fill("1.1")  # the plan was of another merge
    expect(merge).to_be_disabled()
    expect(plan).to_be_empty()
    page.get_by_role("button", name="Show the plan").click()
    expect(merge).to_be_enabled()
    merge.click()
    expect(page.get_by_role("alert").first).to_contain_text("Give the result a name")
    page.get_by_label("Name of the result").fill("Third")
    stub.admin["/admin/models"] = models_document() | {"job": job()}
    stub.admin["/admin/job"] = {"job": job()}
    merge.click()
    expect(page.get_by_role("progressbar")).to_be_visible()
    wanted = {
        "method": "ties",
        "base": "0/base",
        "models": [
            {"file": "0/ward a", "parameters": {"weight": 3.5}},
            {"file": "0/ward b", "parameters": {"weight": 1, "density": 0.5}},
        ],
        "parameters": {"lambda": 1.1, "rescale": "l1", "normalize": False},
        "type": "Q4_K_M",
        "seed": 0,
    }
    assert [path for path, _ in stub.changes] == ["/admin/plan", "/admin/plan", "/admin/merge"]
    assert stub.changes[-2][1] == wanted
    assert stub.changes[-1][1] == wanted | {"name": "Third"}


def test_a_plan_of_other_settings_allows_no_merge(page: Any, stub: PageStub) -> None:
    held: list[Any] = []
    open_tab(page, stub)
    page.get_by_role("checkbox", name="ward a").check()
    ask, plan = page.get_by_role("button", name="Show the plan"), page.locator(".plan")
    merge = page.get_by_role("button", name="Merge", exact=True)
    page.route("**/admin/plan", lambda route: held.append(route))
    ask.click()
    expect(plan).to_have_text("Planning…")
    page.get_by_label("lambda", exact=True).fill("0.9")
    held.pop().fulfill(json=PLAN)
    expect(ask).to_be_enabled()
    expect(plan).to_be_empty()
    expect(merge).to_be_disabled()
    page.unroute("**/admin/plan")
    ask.click()
    expect(merge).to_be_enabled()
    document = models_document()
    document["site"]["files"].append(file("ward c"))
    stub.admin["/admin/models"] = document
    page.evaluate("document.dispatchEvent(new Event('answering'))")  # so that the tab looks again
    expect(page.get_by_role("checkbox", name="ward c")).to_be_visible()
    expect(plan).to_be_empty()
    expect(merge).to_be_disabled()


def test_the_form_follows_the_method(page: Any, stub: PageStub) -> None:
    open_tab(page, stub)
    page.get_by_label("Method").select_option("slerp")
    page.get_by_role("checkbox", name="ward a").check()
    expect(page.get_by_label("t", exact=True)).to_have_value("0.5")
    page.get_by_role("checkbox", name="ward b").check()
    page.get_by_role("button", name="Show the plan").click()
    expect(page.get_by_role("alert").first).to_contain_text("Choose 1 of the models")
    page.get_by_label("Method").select_option("linear")
    expect(page.get_by_label("Base", exact=True)).to_be_hidden()
    page.get_by_role("checkbox", name=BASE).check()
    page.get_by_label("weight of base", exact=True).fill("")
    page.get_by_role("button", name="Show the plan").click()
    expect(page.get_by_role("alert").first).to_contain_text("The number of weight is not one")
    expect(page.get_by_label("weight of base", exact=True)).to_be_focused()
    assert stub.changes == []
    page.get_by_label("weight of base", exact=True).fill("1")
    stub.admin["/admin/plan"] = (400, {"message": "ward a: is no model"})
    page.get_by_role("button", name="Show the plan").click()
    expect(page.locator(".plan")).to_have_text("Ward a: is no model.")
    expect(page.get_by_role("button", name="Merge", exact=True)).to_be_disabled()
    assert stub.changes[0][1]["base"] is None


def test_compare_promote_and_roll_back(page: Any, stub: PageStub) -> None:
    open_tab(page, stub)
    page.get_by_label("general").uncheck()
    page.get_by_role("button", name="Compare: Second").click()
    expect(page.get_by_role("button", name="Compare: Second")).to_be_enabled()
    expect(page.get_by_label("general")).not_to_be_checked()  # it stays as it was set
    page.get_by_label("disease").uncheck()
    expect(page.get_by_role("button", name="Compare: Second")).to_be_disabled()
    promoted = models_document()
    promoted["site"] |= {"current": NEW, "previous": OLD}
    stub.admin["/admin/models"] = promoted
    page.get_by_role("button", name="Promote: Second").click()
    expect(card(page, "Second").locator(".mark")).to_have_text("serves")
    stub.admin["/admin/rollback"] = (409, {"message": "another update is at work"})
    page.get_by_role("button", name="Roll back to First: Second").click()
    expect(page.get_by_role("alert").first).to_contain_text("Another update is at work.")
    assert stub.changes == [
        ("/admin/compare", {"model": NEW, "questions": ["0/disease"]}),
        ("/admin/promote", {"model": NEW}),
        ("/admin/rollback", {}),
    ]


def test_works_without_a_mouse(page: Any, stub: PageStub) -> None:
    page.goto(stub.url)
    page.get_by_role("link", name="Models").focus()
    page.keyboard.press("Enter")
    page.get_by_role("checkbox", name="ward a").focus()
    page.keyboard.press("Space")
    page.keyboard.press("Tab")
    expect(page.get_by_label("weight of ward a, slider")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_label("weight of ward a", exact=True)).to_have_value("1.02")
    page.get_by_label("Name of the result").focus()
    page.keyboard.press("Enter")  # no plan was seen, so nothing begins
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Show the plan")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator(".plan dl")).to_be_visible()
    assert [path for path, _ in stub.changes] == ["/admin/plan"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it(browser: Any, stub: PageStub, scheme: str) -> None:
    document = models_document() | {"job": job(title="x" * 48)}
    document["site"]["models"][0]["name"] = "y" * 48
    document["site"]["files"].append(file("z" * 120))
    stub.admin["/admin/models"] = document
    stub.admin["/admin/job"] = {"job": document["job"]}
    context = browser.new_context(viewport={"width": 360, "height": 640}, color_scheme=scheme)
    page = context.new_page()
    page.goto(f"{stub.url}#/models")
    expect(page.get_by_role("heading", name="Merge", exact=True)).to_be_visible()
    for box in page.get_by_role("checkbox").all():
        box.check()
    for details in page.locator("#workshop summary").all():
        details.click()
    page.get_by_role("button", name="Show the plan").click()
    expect(page.locator(".plan dl")).to_be_visible()
    for place in ("document.documentElement", "document.querySelector('#workshop')"):
        assert page.evaluate(f"{place}.scrollWidth") == 360
    assert page.locator("#workshop").bounding_box()["height"] > 400
    for button in page.locator("#workshop button:visible").all():
        assert button.bounding_box()["height"] >= 38  # a finger's tip
    context.close()


@pytest.mark.llama
def test_with_the_real_server(page: Any, models_dir: Path, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    make_merge_folder(models_dir, files)
    site = SiteFolder(tmp_path / "site")
    arguments = ("--site", site.path, "--merge-from", files, "--memory", "1GiB")
    with Serving(files / "base.gguf", *arguments, key="s3cret", slowly=True) as server:
        page.goto(f"{server.url}/#/models")
        page.get_by_label("This server asks for a key.").fill("s3cret")
        page.keyboard.press("Enter")
        page.get_by_role("checkbox", name="expert-a").check()
        page.get_by_label("weight of expert-a", exact=True).fill("0.5")
        page.get_by_label("Name of the result").fill("Ward 1")
        patience = 60_000
        page.get_by_role("button", name="Show the plan").click()
        expect(page.locator(".plan dl")).to_be_visible(timeout=patience)
        page.get_by_role("button", name="Merge", exact=True).click()
        expect(page.locator(".work .hint")).to_contain_text("Done after", timeout=patience)
        page.get_by_role("button", name="Promote: Ward 1").click()
        expect(card(page, "Ward 1").locator(".mark")).to_have_text("serves", timeout=patience)
        (promoted,) = (one for one in site.records() if one.settings["name"] == "Ward 1")
        assert site.current_id() == promoted.id
        page.get_by_role("button", name="Roll back to base").click()
        expect(card(page, "Ward 1").locator(".mark")).to_have_text("rolled back", timeout=patience)
        assert site.current_id() != promoted.id
