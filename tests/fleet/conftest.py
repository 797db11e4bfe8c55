"""A device whose folder is new, for the tests of updates."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.updates import write_device


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """Give the SITE.yml of a device."""
    return write_device(tmp_path)
