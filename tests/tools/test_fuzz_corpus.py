"""The inputs that fuzzing began from and found: each ends well, soon and in little memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgemerge.errors import EdgemergeError
from tests.support.bounded import bounded
from tools.fuzz.targets import TARGETS

CORPUS = Path(__file__).resolve().parents[1] / "data" / "fuzz"
INPUTS = [path for target in TARGETS for path in sorted((CORPUS / target).iterdir())]
MAX_CORPUS = 200 << 10  # bytes


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A folder for each target, which has read one input: imports and caches are no cost of it."""
    before = logging.root.manager.disable
    logging.disable()  # a model card that cannot be read is told there
    yield {target: tmp_path_factory.mktemp(target) for target in TARGETS}
    logging.disable(before)


def read(path: Path, folders: dict[str, Path]) -> None:
    target = path.parent.name
    try:
        TARGETS[target](path.read_bytes(), folders[target])
    except EdgemergeError as error:
        message = str(error)
    else:
        return
    assert message.isprintable()


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_an_input_is_read_or_refused(path: Path, folders: dict[str, Path]) -> None:
    read(path, folders)  # once for what is imported late
    bounded(lambda: read(path, folders))


def test_the_corpus_is_small_and_all_of_it_is_read() -> None:
    assert {path.name for path in CORPUS.iterdir() if path.is_dir()} == set(TARGETS)
    assert sum(path.stat().st_size for path in INPUTS) < MAX_CORPUS
