"""What is published is fetched; versions only rise; no reader sees a mix, whenever a publisher dies."""

from __future__ import annotations

import fcntl
import json
import math
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import gguf
import pytest

from edgemerge.errors import (
    EdgemergeError,
    FormatError,
    MismatchError,
    OutputError,
    RecipeError,
    VerificationError,
)
from edgemerge.fleet.registry.offers import base_checksum, read_offer, read_scores
from edgemerge.fleet.registry.publishing import Asked, publish, refresh, remove
from tests.support.registries import NOW, Site, ignore, write_delta
from tests.support.tiny_gguf import write_tiny_gguf


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Site:
    site = Site(tmp_path_factory.mktemp("made"))
    site.publish("ward", "1.9", seed=1)
    return site


@pytest.fixture
def site(made: Site, tmp_path: Path) -> Site:
    return made.copy(tmp_path / "site")


def test_a_published_file_is_fetched_as_it_was(site: Site, tmp_path: Path) -> None:
    entry = site.publish("ward", "1.10", seed=2)
    file = (site.folder / "file.gguf").read_bytes()
    there = site.reader()
    found = there.find("ward")
    assert found == entry
    assert (found.version, found.kind, found.base) == ("1.10", "delta", "1234abcd")
    assert (found.licence, found.published) == ("apache-2.0", "2026-06-01T12:00:00+00:00")
    assert found.publisher == site.key("publisher").public_key.keyid
    done: list[tuple[int, int]] = []
    got = there.fetch(found, tmp_path / "got", lambda *at: done.append(at))
    assert got == tmp_path / "got" / "ward-1.10.delta.gguf"
    assert got.read_bytes() == file
    assert done[-1] == (len(file), len(file))
    assert there.fetch(found, tmp_path / "got", ignore) == got
    assert [(e.name, e.version) for e in there.entries()] == [("ward", "1.9"), ("ward", "1.10")]


def test_what_is_not_there_is_said(site: Site) -> None:
    there = site.reader()
    with pytest.raises(RecipeError, match="has no 'wart'; did you mean 'ward'"):
        there.find("wart")
    with pytest.raises(RecipeError, match=r"has no version '2' of ward; it has 1\.9"):
        there.find("ward", "2")
    with pytest.raises(FormatError, match="no such folder"):
        site.reader(site.folder / "nowhere").refresh()


@pytest.mark.parametrize("version", ["1.9", "1.9.0", "1.8", "1", "0"])
def test_a_version_must_be_higher_than_that_name_ever_had(version: str, site: Site) -> None:
    with pytest.raises(RecipeError, match=r"ward had the version 1\.9 already"):
        site.publish("ward", version)
    remove(site.at(NOW), "ward", "1.9")
    assert site.reader().entries() == []
    with pytest.raises(RecipeError, match=r"ward had the version 1\.9 already"):
        site.publish("ward", version)
    site.publish("other", version)


@pytest.mark.parametrize(
    "name", ["", "Ward", "a/b", "..", ".a", "a.", "-a", "ä", "a" * 65, "a b", "a\n"]
)
def test_a_name_that_is_none_is_refused(name: str, site: Site) -> None:
    with pytest.raises(RecipeError, match="cannot be used"):
        site.publish(name)


@pytest.mark.parametrize(
    "version", ["", "01", "1.", "v1", "1.2.3.4.5", "1-2", "latest", "1\n", "-1"]
)
def test_a_version_that_is_none_is_refused(version: str, site: Site) -> None:
    with pytest.raises(RecipeError, match="cannot be used"):
        site.publish("lab", version)


def test_files_that_nobody_names_any_more_go(site: Site) -> None:
    remove(site.at(NOW), "ward", "1.9")
    assert len(list((site.path / "targets").rglob("*.gguf"))) == 1  # a reader may be at it
    site.publish("lab", "1")
    assert [path.parts[-3:-1] for path in (site.path / "targets").rglob("*.gguf")] == [("lab", "1")]
    names = sorted(path.name for path in (site.path / "metadata").iterdir())
    assert names == [
        "1.root.json",
        "3.snapshot.json",
        "3.targets.json",
        "4.snapshot.json",
        "4.targets.json",
        "timestamp.json",
    ]


# -- what a file is ----------------------------------------------------------------------------------


def test_kinds_are_read_from_the_header(tmp_path: Path) -> None:
    model = write_tiny_gguf(tmp_path / "model.gguf")
    assert read_offer(model) == ("model", base_checksum(model), "")
    adapter = write_delta(tmp_path / "adapter.gguf", kind="adapter")
    assert read_offer(adapter) == ("adapter", None, "apache-2.0")
    assert read_offer(adapter, "00000001").base == "00000001"
    with pytest.raises(RecipeError, match="is a model, and has no base"):
        read_offer(model, "00000001")


def test_a_delta_of_another_base_is_not_published(site: Site) -> None:
    file = write_delta(site.folder / "file.gguf", base=1)
    with pytest.raises(MismatchError, match="is a delta of another base: its checksum is 00000001"):
        publish(site.at(NOW), file, Asked("lab", "1", base="1234abcd"), ignore)


def test_what_cannot_be_read_is_not_published(site: Site, tmp_path: Path) -> None:
    before = site.reader().entries()
    (tmp_path / "text.gguf").write_text("no model")
    (tmp_path / "cut.gguf").write_bytes(write_delta(tmp_path / "x.gguf").read_bytes()[:-9])
    write_delta(tmp_path / "imatrix.gguf", kind="imatrix")
    split = gguf.GGUFWriter(tmp_path / "m-00001-of-00002.gguf", "llama")
    split.add_type("model")
    split.add_uint16("split.count", 2)
    split.add_uint16("split.no", 0)
    split.write_header_to_file()
    split.write_kv_data_to_file()
    split.write_tensors_to_file()
    split.close()
    for name in (
        "text.gguf",
        "cut.gguf",
        "imatrix.gguf",
        "m-00001-of-00002.gguf",
        "none.gguf",
        ".",
    ):
        with pytest.raises(EdgemergeError):
            publish(site.at(NOW), tmp_path / name, Asked("lab", "1"), ignore)
    with pytest.raises(FormatError, match="join it with edgemerge convert --type keep"):
        read_offer(tmp_path / "m-00001-of-00002.gguf")
    assert site.reader().entries() == before


def test_figures_are_those_of_one_model(site: Site, tmp_path: Path) -> None:
    row = {"model": "/models/a.gguf", "task": "disease", "n": 250, "acc": 0.8, "loss": 0.61}
    text = {"model": "/models/a.gguf", "text": "/models/t.txt", "perplexity": 4.5, "n_tokens": 99}
    path = tmp_path / "eval.json"
    path.write_text(json.dumps({"results": [row], "perplexity": [text], "comparisons": []}))
    scores = read_scores(path)
    assert scores["tasks"]["disease"]["acc"] == 0.8
    assert scores["perplexity"] == {"t.txt": {"perplexity": 4.5, "stderr": None, "n_tokens": 99}}
    file = write_delta(site.folder / "file.gguf")
    publish(site.at(NOW), file, Asked("lab", "1", scores=scores), ignore)
    assert site.reader().find("lab").scores == scores
    assert "/models" not in (site.path / "metadata" / "3.targets.json").read_text()


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({}, "has no results of edgemerge eval"),
        ({"results": 3}, "no list of rows"),
        ({"results": [{"model": "a"}, {"model": "b"}]}, "has results of 2 models"),
        ({"results": [{"model": "a", "acc": "good"}]}, "figures that are no numbers"),
        ({"results": [{"model": "a", "acc": math.inf}]}, "figures that are no numbers"),
    ],
)
def test_what_are_no_figures_is_refused(
    document: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(document).replace("Infinity", "1e999"))
    with pytest.raises(FormatError, match=words):
        read_scores(path)


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ({"licence": "x" * 201}, "--licence has several lines, or more than 200 characters"),
        ({"licence": "MIT\nas is"}, "--licence has several lines"),
        ({"scores": {"tasks": {"x" * 16384: {}}}}, "--scores has more figures than the 16384"),
    ],
)
def test_what_readers_would_refuse_is_not_published(
    stated: dict[str, Any], words: str, site: Site
) -> None:
    before = sorted(site.path.rglob("*"))
    file = write_delta(site.folder / "file.gguf")
    with pytest.raises(RecipeError, match=words):
        publish(site.at(NOW), file, Asked("lab", "1", **stated), ignore)
    assert sorted(site.path.rglob("*")) == before


def test_the_longest_licence_and_scores_are_read(site: Site) -> None:
    scores = {"a": "x" * (16384 - len('{"a": ""}'))}
    file = write_delta(site.folder / "file.gguf")
    publish(site.at(NOW), file, Asked("lab", "1", "x" * 200, scores=scores), ignore)
    found = site.reader().find("lab")
    assert (found.licence, found.scores) == ("x" * 200, scores)


# -- writing -----------------------------------------------------------------------------------------


def test_a_publisher_that_is_interrupted_leaves_nothing(site: Site) -> None:
    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    before = sorted(site.path.rglob("*"))
    file = write_delta(site.folder / "file.gguf")
    for name in ("ward", "lab"):
        with pytest.raises(KeyboardInterrupt):
            publish(site.at(NOW), file, Asked(name, "2"), interrupt)
        assert sorted(site.path.rglob("*")) == before


def test_two_publishers_do_not_write_at_once(site: Site) -> None:
    with (site.path / ".publishing").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another publish is at work"):
            refresh(site.at(NOW))
    refresh(site.at(NOW))


def test_an_address_is_not_written_to(tmp_path: Path) -> None:
    site = Site(tmp_path, makes=False)
    site.path = Path("https://host/registry")
    with pytest.raises(RecipeError, match="copy the folder to the server"):
        site.at(NOW)


def test_a_folder_that_is_no_registry_is_refused(site: Site, tmp_path: Path) -> None:
    site.path = tmp_path
    with pytest.raises(OutputError, match="is no registry; make one with publish --init"):
        refresh(site.at(NOW))


def test_a_folder_that_was_set_back_is_not_published_in(site: Site) -> None:
    """What was removed would come back, signed anew."""
    old = site.mirror("old")
    remove(site.at(NOW), "ward", "1.9")
    site.path = old
    with pytest.raises(VerificationError, match="is older than what this machine has seen"):
        site.publish("ward", "2")
    (old / "metadata" / "timestamp.json").unlink()
    with pytest.raises(VerificationError, match=r"has lost its timestamp\.json"):
        site.publish("ward", "2")


def test_readers_see_one_index_or_the_next_while_it_is_written(site: Site) -> None:
    def write() -> None:
        for number in range(5):
            refresh(site.at(NOW + timedelta(minutes=number)))

    thread = Thread(target=write)
    thread.start()
    count = 0
    while thread.is_alive():
        there = site.reader(state=f"state-{count}")
        assert [entry.name for entry in there.entries()] == ["ward"]
        count += 1
    thread.join()
    assert count


PUBLISH = """
import os, signal, sys
from datetime import timedelta
from pathlib import Path
from edgemerge.fleet.registry.folder import RegistryFolder
from edgemerge.fleet.registry.keys import read_signers
from edgemerge.fleet.registry.publishing import Asked, publish
folder, left = Path(sys.argv[1]), int(sys.argv[2])
replace = os.replace
def replace_or_die(source, target):
    global left
    if "registry/" in str(target):
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
    replace(source, target)
os.replace = replace_or_die
signers = read_signers([folder / "publisher.pem"])
there = RegistryFolder(folder / "registry", signers, timedelta(90), state=folder / "publisher-state")
publish(there, folder / "file.gguf", Asked("ward", "2"), lambda done, total: None)
"""


@pytest.mark.parametrize("left", [0, 1, 2, 3])
def test_a_publisher_that_is_killed_leaves_the_old_index(left: int, site: Site) -> None:
    """Before the file, the targets, the snapshot and the timestamp get their names."""
    write_delta(site.folder / "file.gguf", seed=7)
    command = [sys.executable, "-c", PUBLISH, str(site.folder), str(left)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert [entry.version for entry in site.reader().entries()] == ["1.9"]
    site.publish("ward", "2", seed=8)
    there = site.reader()
    there.fetch(there.find("ward", "2"), site.folder / "got", ignore)
    names = [path.name for path in site.path.rglob("*") if path.is_file()]
    assert sum("ward-2" in name for name in names) == 1
    assert not any(name.endswith(".part") for name in names)
