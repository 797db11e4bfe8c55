"""SITE.yml: what it may say, and what is said of what it may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgemerge.errors import RecipeError
from edgemerge.fleet.site_file import RegistryPlace, Rule, ServerPlace, read_site
from tests.support.updates import write_device, write_site


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_device(tmp_path)
    (tmp_path / "root.json").write_text("{}")
    (tmp_path / "key").write_text("secret\n")
    return tmp_path


def test_all_that_it_may_say(folder: Path) -> None:
    (folder / "notes.txt").write_text("Some text.")
    path = write_site(
        folder,
        registry={"address": "https://models.example.org/r", "trust": "root.json"},
        base={"name": "smollm2", "version": 3},
        experts=[
            {"name": "disease", "version": "newest", "weight": 0.5},
            {"name": "substance", "version": "1.10"},
            {"path": "b.gguf", "weight": 1},
        ],
        merge={
            "method": "ties",
            "parameters": {"density": 0.5},
            "memory": "512MiB",
            "align": False,
        },
        texts={"notes": "notes.txt"},
        promote={
            "margin": {"disease": 0, "notes": 5},
            "confidence": 0.9,
            "better": ["disease"],
            "slowdown": 2,
            "smoke": {"ask": "What is insulin?", "expect": "hormone"},
            "watch": 60,
        },
        serve={"address": "http://127.0.0.1:8080/", "key": "key", "model": "ward"},
        keep=5,
        reports="reports",
        threads=2,
    )
    site = read_site(path)
    assert site.registry == RegistryPlace("https://models.example.org/r", folder / "root.json")
    assert site.base is not None
    assert (site.base.name, site.base.version) == ("smollm2", "3")
    wanted = [(one.title, one.version, one.weight) for one in site.experts]
    assert wanted == [("disease", None, 0.5), ("substance", "1.10", None), ("b.gguf", None, 1.0)]
    assert (site.merge.memory, site.merge.align) == (512 << 20, "off")
    assert site.rule == Rule(
        margins={"disease": 0.0, "notes": 5.0},
        confidence=0.9,
        better=("disease",),
        slowdown=2.0,
        ask="What is insulin?",
        expect="hormone",
        watch=60.0,
    )
    assert [site.rule.margin_of(name) for name in ("disease", "notes", "general")] == [0, 5, 2]
    assert site.serve == ServerPlace("http://127.0.0.1:8080", folder / "key", "ward")
    assert (site.keep, site.reports, site.threads) == (5, folder / "reports", 2)
    assert site.folder == folder / "site"


def test_the_folder_is_beside_the_file_by_default(folder: Path) -> None:
    assert read_site(write_site(folder, folder=None)).folder == folder


def test_the_home_folder_is_meant_by_its_sign(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    path = write_site(folder, folder="~/edge", base={"path": "~/base.gguf"}, reports="~")
    site = read_site(path)
    assert site.base is not None
    assert (site.folder, site.base.path) == (folder / "edge", folder / "base.gguf")
    assert site.reports == folder


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"expert": []}, "unknown key 'expert'; did you mean 'experts'"),
    "unknown key inside": ({"promote": {"margins": 2}}, "'margins'; did you mean 'margin'"),
    "no questions": ({"questions": None}, "names no questions"),
    "no base": ({"base": None}, "names no base"),
    "no experts": ({"experts": []}, "experts must be a list that is not empty"),
    "no registry": ({"base": {"name": "tiny"}}, "file names none; add registry"),
    "base as a text": ({"base": "base.gguf"}, r"write {path: base.gguf}, or {name: NAME}"),
    "no trust": ({"registry": {"address": "r"}}, "registry.trust is missing; give a path"),
    "path and name": ({"base": {"path": "base.gguf", "name": "x"}}, "a path and a name"),
    "weight of the base": ({"base": {"path": "base.gguf", "weight": 1}}, "unknown key 'weight'"),
    "no such file": ({"experts": [{"path": "c.gguf"}]}, r"experts\[0\].path: there is no"),
    "unknown method": ({"merge": {"method": "tie"}}, "did you mean 'ties'"),
    "unknown parameter": (
        {"merge": {"method": "ties", "parameters": {"densty": 1}}},
        "did you mean 'density'",
    ),
    "size": ({"merge": {"method": "ties", "memory": "much"}}, "merge.memory"),
    "recipe and method": ({"merge": {"recipe": "SITE.yml", "type": "F16"}}, "into the recipe"),
    "recipe and experts": (
        {"merge": {"recipe": "SITE.yml"}},
        "has experts, which merge.recipe names",
    ),
    "recipe and base of a registry": (
        {
            "registry": {"address": "r", "trust": "root.json"},
            "merge": {"recipe": "SITE.yml"},
            "base": {"name": "tiny"},
            "experts": None,
        },
        "has a recipe, so base must be {path: FILE.gguf}",
    ),
    "better": ({"promote": {"better": ["diseases"]}}, "did you mean 'disease'"),
    "margin": ({"promote": {"margin": -1}}, "promote.margin is -1; give a number from 0 to 100"),
    "margin of what": ({"promote": {"margin": {"desease": 1}}}, "did you mean 'disease'"),
    "confidence": ({"promote": {"confidence": 95}}, "from 0.5 to 0.9999"),
    "expect alone": ({"promote": {"smoke": {"expect": "x"}}}, "give ask too"),
    "keep": ({"keep": 1.5}, "a whole number from 1"),
    "address": ({"serve": {"address": "127.0.0.1:8080"}}, "give it as http://"),
    "bracket": ({"serve": {"address": "http://[::1:8080"}}, "give it as http://"),
    "port": ({"serve": {"address": "http://127.0.0.1:80800"}}, "give it as http://"),
    "device": ({"device": "../x"}, "a name of letters"),
    "twice": ({"texts": {"disease": "disease.jsonl"}}, "rename one"),
    "version": (
        {
            "registry": {"address": "r", "trust": "root.json"},
            "base": {"name": "tiny", "version": 1.10},
        },
        "is a number with a point",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_named(folder: Path, wrong: str) -> None:
    changes, message = WRONG[wrong]
    with pytest.raises(RecipeError, match=message) as caught:
        read_site(write_site(folder, **changes))
    assert str(caught.value).startswith(f"{folder / 'SITE.yml'}: ")
    assert "\n" not in str(caught.value)


def test_a_folder_is_not_what_was_meant(folder: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        read_site(folder)
    assert "did you mean" not in str(caught.value)


def test_a_key_that_stands_twice_is_refused(folder: Path) -> None:
    path = folder / "SITE.yml"
    path.write_text(path.read_text() + "device: other\n")
    with pytest.raises(RecipeError, match="stands twice; remove one of the two"):
        read_site(path)
