"""The files of the web page, read without a browser."""

from __future__ import annotations

import re

from tests.runtime.serve.page_stub import STATIC


def test_page_is_small_and_talks_to_nobody_else() -> None:
    files = list(STATIC.iterdir())
    # the modules that `tabs.js` loads when somebody opens the Models tab come on top
    later = {f"{name}.js" for name in ("models", "merging", "setting", "comparison", "work")}
    sizes = {file.name: file.stat().st_size for file in files}
    assert sum(size for name, size in sizes.items() if name not in later) < 44_000
    assert sum(sizes.values()) < 72_000
    for file in files:
        urls = re.findall(r"https?://[\w./]+", file.read_text(encoding="utf-8"))
        assert set(urls) <= {"http://www.w3.org/2000/svg"}, file.name
        assert not re.search(r"innerHTML|insertAdjacent|eval\(", file.read_text(encoding="utf-8"))
