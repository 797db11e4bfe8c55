#!/usr/bin/env python3
"""Show the page of `edgemerge serve` to Chromium, let a model answer, and keep the picture.

    tools/screenshot.py model.gguf --out benchmarks/figures/serve.png
    tools/screenshot.py base.gguf --merge-from FOLDER --out docs/models-tab.png

With --merge-from it merges the models of a folder on the Models tab, compares the result, and keeps a picture
of that.

Needs playwright (`pip install playwright`) and Chromium (`apt install chromium`, or $CHROMIUM).
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
# offline, and without what a container lacks
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]

QUESTIONS = [
    "What does a pharmacist do? Answer in two sentences.",
    "Why should people drink enough water?",
]
PAUSE_MS = 15_000  # between two questions: the curves of the panel need time to grow
COLOURS = 48  # of the picture of the Models tab: it has no more that differ
ANSWER_MS = 180_000  # a small board is slow


def launch_chromium(driver: Any) -> Any:
    """Start the browser, with a profile of its own."""
    return driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


@contextmanager
def running_server(*arguments: str, key: str | None = None) -> Iterator[str]:
    """Run `edgemerge serve` with these arguments until the block ends; gives its address."""
    command = [sys.executable, "-m", "edgemerge", "serve", *arguments]
    environment = os.environ if key is None else {**os.environ, "EDGEMERGE_API_KEY": key}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as server:
        try:
            yield _read_address(server)
        finally:
            server.send_signal(signal.SIGTERM)
            server.communicate(timeout=60)


def _read_address(server: subprocess.Popen[str]) -> str:
    said = ""
    for line in server.stdout or ():
        said += line
        if match := re.search(r"http://[\w.:\[\]-]+", line):
            return f"{match[0].rstrip('/')}/"
    raise RuntimeError(f"the server did not start: {said}")


def take_picture(url: str, out: Path) -> None:
    """Ask the questions and write the page as it looks then."""
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as driver:
        browser = launch_chromium(driver)
        page = browser.new_page(viewport={"width": 1280, "height": 860})
        page.goto(url)
        page.locator("#limit").fill("200")
        page.locator("#heat").fill("0")
        for n, question in enumerate(QUESTIONS, start=1):
            expect(page.locator("#model")).to_be_enabled()
            page.locator("#text").fill(question)
            page.keyboard.press("Enter")
            # an answer's note is written when it has ended
            expect(page.locator("article.assistant .note:not(:empty)")).to_have_count(
                n, timeout=ANSWER_MS
            )
            page.wait_for_timeout(PAUSE_MS)
        page.screenshot(path=out)
        browser.close()


def take_models_picture(url: str, key: str, out: Path) -> None:
    """Merge on the Models tab, compare, plan the next merge, and write the tab as it looks then."""
    from PIL import Image
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as driver:
        browser = launch_chromium(driver)
        page = browser.new_page(viewport={"width": 720, "height": 1500})
        page.goto(f"{url}#/models")
        page.get_by_label("This server asks for a key.").fill(key)
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", name="Merge", exact=True)).to_be_visible()
        boxes = page.locator(".models input[type=checkbox]")
        for box in boxes.all():
            box.check()
        page.get_by_label("Type of the output").select_option("Q8_0")
        page.get_by_label("Name of the result").fill("Ward 1")
        page.get_by_role("button", name="Show the plan").click()
        page.get_by_role("button", name="Merge", exact=True).click(timeout=ANSWER_MS)
        done = page.locator(".work .hint")
        expect(done).to_contain_text("Done after", timeout=ANSWER_MS)
        page.get_by_role("button", name="Compare: Ward 1").click()
        expect(done).to_contain_text("questions", timeout=ANSWER_MS)
        expect(done).to_contain_text("Done after", timeout=ANSWER_MS)
        page.get_by_role("button", name="Show the plan").click()
        expect(page.locator(".plan dl")).to_be_visible(timeout=ANSWER_MS)
        page.get_by_role("heading", name="In this device's folder").evaluate(
            "node => node.scrollIntoView()"
        )
        page.screenshot(path=out)
        browser.close()
    with Image.open(out) as picture:
        picture.quantize(COLOURS).save(out, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="+", help="GGUF files to serve")
    parser.add_argument("--memory", default="1GiB", help="budget of the server")
    parser.add_argument("--merge-from", help="folder of models and questions for the Models tab")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/figures/serve.png"))
    options = parser.parse_args()
    arguments = [*options.model, "--port", "0", "--memory", options.memory]
    if options.merge_from is None:
        with running_server(*arguments) as url:
            take_picture(url, options.out)
        return
    key = secrets.token_hex(24)
    with TemporaryDirectory() as site:
        arguments += ["--site", site, "--merge-from", options.merge_from]
        with running_server(*arguments, key=key) as url:
            take_models_picture(url, key, options.out)


if __name__ == "__main__":
    main()
