"""Chromium, for the tests of the web page; and models that are asked without a process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgemerge.runtime.serve import reload as reload_module
from edgemerge.runtime.serve.loaded import Loaded
from tests.runtime.serve.page_stub import PageStub
from tests.support.replaced_files import MIB, ODD
from tools.screenshot import CHROMIUM, launch_chromium

WAIT = 10_000  # ms; a busy machine is slow to draw


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="the page is not tested: pip install playwright"
    )
    if not Path(CHROMIUM).exists():
        pytest.skip(f"the page is not tested: there is no {CHROMIUM}")
    with playwright.sync_playwright() as driver:
        playwright.expect.set_options(timeout=WAIT)
        browser = launch_chromium(driver)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page of its own profile; what it complains about fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(WAIT)
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda entry: complaints.append(entry.text))
    yield page
    context.close()
    # a refused request is logged by the browser itself
    assert [text for text in complaints if "Failed to load resource" not in text] == []


@pytest.fixture
def stub() -> Iterator[PageStub]:
    with PageStub() as stub:
        yield stub


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let models be asked without a process; these are the names of those that were."""
    names: list[str] = []

    async def ask(loaded: Loaded) -> str | None:
        names.append(loaded.file.name)
        return "it has no answer to a simple question" if loaded.file.need == ODD * MIB else None

    monkeypatch.setattr(reload_module, "_find_oddity", ask)
    return names
