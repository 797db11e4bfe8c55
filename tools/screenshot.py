#!/usr/bin/env python3
"""Show the page of `edgemerge serve` to Chromium, let a model answer, and keep the picture.

    tools/screenshot.py model.gguf --out benchmarks/figures/serve.png

Needs playwright (`pip install playwright`) and Chromium (`apt install chromium`, or $CHROMIUM).
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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
ANSWER_MS = 180_000  # a small board is slow


def launch_chromium(driver: Any) -> Any:
    """Start the browser, with a profile of its own."""
    return driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


@contextmanager
def running_server(*arguments: str) -> Iterator[str]:
    """Run `edgemerge serve` with these arguments until the block ends; gives its address."""
    command = [sys.executable, "-m", "edgemerge", "serve", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="+", help="GGUF files to serve")
    parser.add_argument("--memory", default="1GiB", help="budget of the server")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/figures/serve.png"))
    options = parser.parse_args()
    with running_server(*options.model, "--port", "0", "--memory", options.memory) as url:
        take_picture(url, options.out)


if __name__ == "__main__":
    main()
