"""The web page in Chromium, against a server that does as it is told (and, below, the real one)."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.serve.page_stub import PageStub
from tests.support.serving import Serving, make_served_gguf

EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


def ask(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def expect(locator: Any) -> Any:
    from playwright.sync_api import expect  # where there is none, `browser` has skipped the test

    return expect(locator)


def test_chats_and_keeps_the_conversation_over_a_reload(page: Any, stub: PageStub) -> None:
    page.goto(stub.url)
    page.get_by_label("System prompt").fill("Be brief.")
    ask(page, "Hello?")
    expect(page.locator("article.assistant .text")).to_have_text("Hello there.")
    expect(page.locator("article.assistant .note")).to_contain_text("First word after")
    page.reload()
    expect(page.locator("article.user .text")).to_have_text("Hello?")
    expect(page.locator("article.assistant .text")).to_have_text("Hello there.")
    ask(page, "And?")
    expect(page.locator("article.assistant")).to_have_count(2)
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    first, second = stub.requests
    assert first == {
        "model": "ward",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello?"},
        ],
        "temperature": 0.7,
        "max_tokens": 512,
        "stream": True,
    }
    assert [m["content"] for m in second["messages"]] == [
        "Be brief.",
        "Hello?",
        "Hello there.",
        "And?",
    ]
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("article")).to_have_count(0)
    page.reload()
    expect(page.locator("article")).to_have_count(0)


def test_model_and_settings_go_with_the_question(page: Any, stub: PageStub) -> None:
    page.goto(stub.url)
    page.get_by_label("Model").select_option("base")
    page.get_by_label("Longest answer").fill("7")
    page.locator("#heat").fill("0")
    page.reload()
    ask(page, "Hello?")
    expect(page.locator("article.assistant .who")).to_have_text("base")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    assert {key: stub.requests[0][key] for key in ("model", "max_tokens", "temperature")} == {
        "model": "base",
        "max_tokens": 7,
        "temperature": 0,
    }


def test_works_without_a_mouse(page: Any, stub: PageStub) -> None:
    page.goto(stub.url)
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    stub.pieces, stub.pause = ["word "] * 200, 0.05
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect(page.locator("article.user .text")).to_have_text("one\ntwo", use_inner_text=True)
    expect(page.locator("article.assistant .text")).to_contain_text("word word")
    expect(page.get_by_role("log")).to_have_attribute("aria-busy", "true")
    page.keyboard.press("Escape")
    expect(page.locator("article.assistant .note")).to_have_text("Stopped.")
    expect(page.get_by_role("log")).to_have_attribute("aria-busy", "false")
    assert len(page.locator("article.assistant .text").inner_text().split()) < 200
    page.keyboard.press("Shift+Tab")
    expect(page.get_by_role("log")).to_be_focused()


def test_stop_button_ends_an_answer_before_its_first_word(page: Any, stub: PageStub) -> None:
    page.goto(stub.url)
    stub.pause = 3.0
    ask(page, "Hello?")
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("alert")).to_contain_text("Stopped before the first word.")
    expect(page.locator("article.assistant")).to_have_count(0)
    stub.pause = 0.0
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("article.assistant .text")).to_have_text("Hello there.")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_question_waits_until_the_models_are_known(page: Any, stub: PageStub) -> None:
    stub.listing = 1.0
    page.goto(stub.url)
    ask(page, "Hello?")
    ask(page, "One more?")  # not while an answer is awaited
    expect(page.locator("article.assistant .text")).to_have_text("Hello there.")
    expect(page.locator("article.assistant .who")).to_have_text("ward")
    assert [request["model"] for request in stub.requests] == ["ward"]


@pytest.mark.parametrize("button", ["Stop", "New conversation"])
def test_wait_for_the_models_ends_when_asked(page: Any, stub: PageStub, button: str) -> None:
    stub.listing = 5.0
    page.goto(stub.url)
    ask(page, "Hello?")
    page.get_by_role("button", name=button).click()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(page.locator("article")).to_have_count(1 if button == "Stop" else 0)
    expect(page.get_by_role("button", name="Try again")).to_be_visible(visible=button == "Stop")
    assert stub.requests == []


def test_text_of_a_model_is_text(page: Any, stub: PageStub) -> None:
    stub.models = [EVIL, "base"]
    stub.pieces = [EVIL[:10], EVIL[10:]]
    page.goto(stub.url)
    ask(page, EVIL)
    expect(page.locator("article.assistant .text")).to_have_text(EVIL)
    expect(page.locator("article.assistant .who")).to_have_text(EVIL)
    expect(page.locator("#models dd")).to_contain_text(EVIL)
    stub.refusal = (400, {}, {"message": EVIL})
    ask(page, "again")
    expect(page.get_by_role("alert")).to_contain_text("<img src=x")
    page.reload()
    expect(page.locator("article.assistant .text")).to_have_text(EVIL)
    assert page.title() == "edgemerge"
    assert page.locator("article img, #notice img, #models img").count() == 0


def test_policy_stops_scripts_that_get_in_anyway(browser: Any, stub: PageStub) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(stub.url)
    page.evaluate("html => document.querySelector('#log').innerHTML = html", EVIL)
    page.wait_for_timeout(300)
    assert page.title() == "edgemerge"
    context.close()


def test_figures_are_live_and_pause_while_nobody_looks(page: Any, stub: PageStub) -> None:
    page.goto(stub.url)
    expect(page.locator("#memory dd")).to_contain_text("MiB of 1.00 GiB")
    expect(page.locator("#queue dd")).to_have_text("1 running, 2 of 16 waiting")
    expect(page.locator("#models dd")).to_have_text("ward, 98 MiB, 3 of 8 at a time")
    expect(page.locator("#throttled dd")).to_have_text("no")
    expect(page.locator("#first b")).to_have_text("0.25")
    before = page.locator("#speed b").inner_text()
    expect(page.locator("#speed b")).not_to_have_text(before)
    expect(page.locator("#speed polyline")).to_have_count(1)
    hide = "h => { Object.defineProperty(document, 'hidden', {value: h, configurable: true}); "
    hide += "document.dispatchEvent(new Event('visibilitychange')); }"
    page.evaluate(hide, True)
    page.wait_for_timeout(500)
    looks = stub.looks
    page.wait_for_timeout(3000)
    assert stub.looks == looks
    page.evaluate(hide, False)
    page.wait_for_timeout(500)
    assert stub.looks == looks + 1


def test_what_a_board_does_not_report_is_not_shown(page: Any, stub: PageStub) -> None:
    unknown = ("temperature_c", "throttled", "tokens_per_second", "time_to_first_token_s")
    full = stub.health
    stub.health = lambda: full() | dict.fromkeys(unknown)  # type: ignore[method-assign]
    page.goto(stub.url)
    expect(page.locator("#memory dd")).to_contain_text("MiB of")
    expect(page.locator("#speed b")).to_have_text("\N{EN DASH}")
    expect(page.locator("#temperature dd")).to_contain_text("not reported")
    expect(page.locator("#throttled dd")).to_have_text("not reported")


def test_busy_server_is_told_in_one_sentence(page: Any, stub: PageStub) -> None:
    page.goto(stub.url)
    stub.refusal = (429, {"Retry-After": "2"}, {"message": "the queue is full"})
    ask(page, "Hello?")
    expect(page.get_by_role("alert")).to_contain_text("The server is busy; try again in 2 s.")
    expect(page.get_by_role("alert")).to_contain_text("You can try again now.")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("article.assistant .text")).to_have_text("Hello there.")
    assert stub.requests[0] == stub.requests[1]


@pytest.mark.parametrize(
    ("status", "body", "sentence"),
    [
        (400, {"code": "context_length_exceeded"}, "longer than the model can read"),
        (404, {"message": "there is no model 'x'"}, "There is no model 'x'."),
        (500, {}, "The server refused the request (HTTP 500)."),
        (503, {"message": "the server is stopping"}, "The server is stopping."),
    ],
)
def test_refusals(
    page: Any, stub: PageStub, status: int, body: dict[str, str], sentence: str
) -> None:
    page.goto(stub.url)
    stub.refusal = (status, {}, body)
    ask(page, "Hello?")
    expect(page.get_by_role("alert")).to_contain_text(sentence)


def test_key_is_asked_for_only_when_needed(page: Any, stub: PageStub) -> None:
    stub.key = "s3cret"
    page.goto(stub.url)
    expect(page.get_by_label("This server asks for a key.")).to_be_focused()
    expect(page.locator("#version")).to_contain_text("the figures need the key")
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    wrong = page.get_by_label("The server does not accept this key.")
    expect(wrong).to_be_focused()
    wrong.fill("s3cret")
    page.keyboard.press("Enter")
    expect(page.locator("#unlock")).to_be_hidden()
    expect(page.locator("#memory dd")).to_contain_text("MiB of")
    page.reload()
    ask(page, "Hello?")
    expect(page.locator("article.assistant .text")).to_have_text("Hello there.")
    stub.key = "changed"  # the question waits for the new key, and is then asked by itself
    ask(page, "More?")
    page.get_by_label("The server does not accept this key.").fill("changed")
    page.keyboard.press("Enter")
    expect(page.locator("article.assistant")).to_have_count(2)


def test_a_key_that_no_request_can_carry_is_wrong(page: Any, stub: PageStub) -> None:
    stub.key = "s3cret"
    page.goto(stub.url)
    page.get_by_label("This server asks for a key.").fill("ключ")
    page.keyboard.press("Enter")
    expect(page.get_by_label("The server does not accept this key.")).to_be_focused()
    page.reload()
    expect(page.locator("#version")).to_contain_text("the figures need the key")


def test_no_key_no_field(page: Any, stub: PageStub) -> None:
    page.goto(stub.url)
    expect(page.get_by_label("Model")).to_be_enabled()
    expect(page.locator("#unlock")).to_be_hidden()


def test_answer_that_breaks_off_is_kept_and_can_be_asked_again(page: Any, stub: PageStub) -> None:
    page.goto(stub.url)
    stub.broken = True
    ask(page, "Hello?")
    expect(page.get_by_role("alert")).to_contain_text("went away in the middle of the answer")
    expect(page.locator("article.assistant .text")).to_have_text("Hello there.")
    expect(page.locator("article.assistant .note")).to_have_text("Cut off.")
    stub.broken = False
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("article.assistant .note")).to_contain_text("First word after")
    expect(page.locator("article.assistant")).to_have_count(1)


def test_reload_in_the_middle_of_an_answer(page: Any, stub: PageStub) -> None:
    page.goto(stub.url)
    stub.pieces, stub.pause = ["word "] * 200, 0.05
    ask(page, "Hello?")
    expect(page.locator("article.assistant .text")).to_contain_text("word word")
    page.reload()
    expect(page.locator("article.assistant .text")).to_contain_text("word word")
    stub.pieces, stub.pause = ["all of it"], 0.0
    expect(page.get_by_role("alert")).to_contain_text("The last answer is not whole.")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("article.assistant .text")).to_have_text("all of it")


def test_survives_a_restart_of_the_server(page: Any) -> None:
    with PageStub() as stub:
        page.goto(stub.url)
        ask(page, "Hello?")
        expect(page.locator("article.assistant .text")).to_have_text("Hello there.")
    expect(page.locator("#offline")).to_have_text("The server does not answer; trying again.")
    ask(page, "Still there?")
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer.")
    with PageStub(stub.port) as stub:
        expect(page.locator("#offline")).to_be_hidden()
        expect(page.get_by_role("alert")).to_contain_text("The server answers again.")
        page.get_by_role("button", name="Try again").click()
        expect(page.locator("article.assistant")).to_have_count(2)
        assert [m["content"] for m in stub.requests[0]["messages"]] == [
            "Hello?",
            "Hello there.",
            "Still there?",
        ]


def test_an_answer_that_is_cut_off_is_none(page: Any, stub: PageStub) -> None:
    stub.torn = True
    page.goto(stub.url)
    expect(page.locator("#offline")).to_be_visible()
    stub.torn = False
    expect(page.locator("#offline")).to_be_hidden()


def test_phone_has_room_for_the_conversation(browser: Any, stub: PageStub) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 640}, color_scheme="dark")
    page = context.new_page()
    page.goto(stub.url)
    ask(page, "Hello?")
    expect(page.locator("article.assistant .text")).to_have_text("Hello there.")
    expect(page.locator("#brief")).to_contain_text("tokens/s")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.locator("#log").bounding_box()["height"] > 300
    context.close()


@pytest.fixture(scope="module")
def model(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_served_gguf(models_dir, tmp_path_factory.mktemp("page") / "ward.gguf")


def chat(page: Any, n_answers: int) -> None:
    """Ask the real server, which may be slow on a busy machine."""
    ask(page, "What helps against pain?")
    notes = page.locator("article.assistant .note:not(:empty)")
    expect(notes).to_have_count(n_answers, timeout=30_000)
    expect(page.locator("article.assistant .text").last).not_to_be_empty()


@pytest.mark.llama
def test_with_the_real_server_and_over_its_restart(page: Any, model: Path) -> None:
    with Serving(model, "--memory", "1GiB", slowly=True) as server:
        page.goto(server.url)
        expect(page.locator("#memory dd")).to_contain_text("MiB of 1.00 GiB")
        expect(page.locator("#speed b")).to_have_text("\N{EN DASH}")
        page.get_by_label("Longest answer").fill("8")
        page.locator("#heat").fill("0")
        chat(page, 1)
        expect(page.locator("#speed b")).to_have_text(re.compile(r"\d"))
        expect(page.locator("#requests dd")).to_have_text("1 answered")
        said = page.locator("article.assistant .text").inner_text()
        server.stop()
        assert server.wait() == 0
    expect(page.locator("#offline")).to_be_visible()
    with Serving(model, "--memory", "1GiB", "--port", server.port, slowly=True):
        expect(page.locator("#offline")).to_be_hidden()
        expect(page.locator("#requests dd")).to_have_text("0 answered")
        page.reload()
        expect(page.locator("article.assistant .text")).to_have_text(said, use_inner_text=True)
        chat(page, 2)


@pytest.mark.llama
def test_with_the_real_servers_key(page: Any, model: Path) -> None:
    with Serving(model, key="s3cret", slowly=True) as server:
        page.goto(server.url)
        page.get_by_label("This server asks for a key.").fill("s3cret")
        page.keyboard.press("Enter")
        expect(page.locator("#memory dd")).to_contain_text("MiB of")
        page.get_by_label("Longest answer").fill("8")
        chat(page, 1)


@pytest.mark.llama
def test_with_the_real_servers_full_queue(page: Any, model: Path) -> None:
    question = {"model": "ward", "messages": [{"role": "user", "content": "Hello?"}]}
    with (
        Serving(model, "--queue", "1", "--parallel", "1", slowly=True) as server,
        ThreadPoolExecutor(max_workers=2) as others,
    ):
        page.goto(server.url)
        expect(page.get_by_label("Model")).to_be_enabled()
        answers = [others.submit(server.post, "/v1/chat/completions", question) for _ in range(2)]
        server.wait_until(running=1, waiting=1)
        ask(page, "And against a cough?")
        expect(page.get_by_role("alert")).to_contain_text("The server is busy; try again in")
        expect(page.locator("#queue dd")).to_have_text("1 running, 1 of 1 waiting")
        assert [answer.result().status for answer in answers] == [200, 200]
        page.get_by_role("button", name="Try again").click()
        expect(page.locator("article.assistant .text")).not_to_be_empty()
