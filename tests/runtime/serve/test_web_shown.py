"""What the page shows in Chromium: answers in Markdown, and how the models are."""

from __future__ import annotations

from typing import Any

import pytest

from tests.runtime.serve.page_stub import PageStub
from tests.runtime.serve.test_web_page import EVIL, ask, expect

MARKDOWN = f"""# Doses
Take **two *small* ones** of `a<b` and no more: 2*3*4 is 24.

1. first
   - inner **one**
   - inner two
2. second

```js
if (a < b) {{ **no** }}
{EVIL}
```
[a link](javascript:alert(1)) {EVIL}"""


def test_markdown_is_shown_and_nothing_in_it_has_an_effect(page: Any, stub: PageStub) -> None:
    stub.pieces = [MARKDOWN[i : i + 7] for i in range(0, len(MARKDOWN), 7)]
    page.set_viewport_size({"width": 360, "height": 640})  # a phone
    page.goto(stub.url)
    ask(page, "**Hello?**")
    expect(page.locator("article.assistant .note")).to_contain_text("First word after")
    text = page.locator("article.assistant .text")
    for _ in range(2):
        expect(page.locator("article.user .text")).to_have_text("**Hello?**")
        expect(text.locator("h3")).to_have_text("Doses")
        expect(text.locator("strong").first).to_have_text("two small ones")
        expect(text.locator("em")).to_have_text(["small"])
        expect(text.locator("p code")).to_have_text("a<b")
        expect(text.locator("ol > li")).to_have_count(2)
        expect(text.locator("ol ul > li")).to_have_text(["inner one", "inner two"])
        expect(text.locator("pre code")).to_have_text(f"if (a < b) {{ **no** }}\n{EVIL}")
        expect(text.locator("p").last).to_have_text(f"[a link](javascript:alert(1)) {EVIL}")
        assert text.locator("a, img, script").count() == 0
        assert page.title() == "edgemerge"
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 360
        page.reload()


def test_rules_and_lists_of_any_depth_are_shown(page: Any, stub: PageStub) -> None:
    stub.pieces = ["a\n* * *\n- b\n- - -\n", f"{'- ' * 20_000}deep"]
    page.goto(stub.url)
    ask(page, "Hello?")
    text = page.locator("article.assistant .text")
    for _ in range(2):
        expect(text).to_contain_text("deep")
        expect(text.locator("> hr")).to_have_count(2)
        expect(text.locator("> ul > li").first).to_have_text("b")
        expect(text.locator("ul")).to_have_count(1 + 20)
        page.reload()


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ("loading", "ward, being loaded"),
        ("crashed", "ward, stopped by an error; the next question starts it"),
        ("closed", "none loaded"),
    ],
)
def test_it_tells_how_models_are(page: Any, stub: PageStub, state: str, told: str) -> None:
    stub.model_state["state"] = state
    page.goto(stub.url)
    expect(page.locator("#models dd")).to_have_text(told)
