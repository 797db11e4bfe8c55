"""What the page may merge: files of the operator's folders, and methods with their numbers."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from edgemerge.cli.tasks import read_tasks
from edgemerge.merging.run import plan
from edgemerge.methods.table import METHODS
from edgemerge.recipe.recipe import load_recipe
from edgemerge.runtime.serve.errors import Refusal
from edgemerge.runtime.serve.merging.choices import (
    TYPES,
    MergeRequest,
    PlanRequest,
    describe_methods,
    read_request,
)
from edgemerge.runtime.serve.merging.compared import name_tasks
from edgemerge.runtime.serve.merging.offers import Offer, Offers
from tests.support.site_models import make_merge_folder

Document = dict[str, Any]


@pytest.fixture(scope="module")
def folder(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_merge_folder(models_dir, tmp_path_factory.mktemp("offers"))


@pytest.fixture(scope="module")
def offers(folder: Path) -> Offers:
    return Offers([folder])


def test_only_what_can_be_merged_or_asked_is_offered(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "a +folder=with @signs"
    other.mkdir()
    shutil.copy(folder / "expert-a.gguf", other / "0.7*x+y@z.gguf")
    (other / "broken.gguf").write_bytes((folder / "base.gguf").read_bytes()[:100])
    (other / "log.jsonl").write_text('{"event": "promoted"}\n')
    (other / "empty.jsonl").write_text("")
    (other / "gone.gguf").symlink_to(other / "nowhere.gguf")
    shutil.copy(folder / "base.gguf", other / os.fsdecode(b"caf\xe9.gguf"))
    (other / "part-00001-of-00002.gguf").write_bytes(b"GGUF")
    (other / "folder.gguf").mkdir()
    os.mkfifo(other / "pipe.gguf")
    offers = Offers([folder, other, tmp_path / "missing"])
    found = {offer.key: (offer.name, offer.kind, offer.base) for offer in offers.read({})}
    assert found == {
        "0/base.gguf": ("base", "model", ""),
        "0/delta-b.gguf": ("delta-b", "delta", "base.gguf"),
        "0/expert-a.gguf": ("expert-a", "model", ""),
        "0/disease.jsonl": ("disease", "questions", ""),
        "0/general.jsonl": ("general", "questions", ""),
        "1/0.7*x+y@z.gguf": ("0.7*x+y@z", "model", ""),
    }
    assert all("path" not in offer.as_json() for offer in offers.read({}))
    assert offers.read({"base": "The base"})[0].name == "The base"


@pytest.mark.parametrize(
    "key", ["", "../base.gguf", "0/../base.gguf", "/etc/passwd", "0/general.jsonl"]
)
def test_a_key_is_one_of_the_list(offers: Offers, key: str) -> None:
    with pytest.raises(Refusal) as caught:
        offers.take(key)
    assert caught.value.status == 404


def test_a_file_that_changed_is_read_again(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    shutil.copy(folder / "base.gguf", path)
    offers = Offers([tmp_path])
    assert offers.take("0/x.gguf").kind == "model"
    shutil.copy(folder / "delta-b.gguf", path)
    assert offers.take("0/x.gguf").kind == "delta"


def taken(name: str, **parameters: object) -> Document:
    return {"file": f"0/{name}.gguf", "parameters": parameters}


def ask(offers: Offers, **document: Any) -> Any:
    usual = {"method": "ties", "base": "0/base.gguf", "models": [taken("expert-a", weight=1)]}
    return read_request(PlanRequest.model_validate(usual | document), offers)


def test_the_recipe_names_files_so_that_no_letter_has_a_meaning(
    folder: Path, tmp_path: Path
) -> None:
    for name in ("base", "expert-a"):
        shutil.copy(folder / f"{name}.gguf", tmp_path / f"0.5*{name}+x@y=1.gguf")
    request = PlanRequest.model_validate(
        {
            "method": "ties",
            "base": "0/0.5*base+x@y=1.gguf",
            "models": [{"file": "0/0.5*expert-a+x@y=1.gguf", "parameters": {"weight": 1}}],
        }
    )
    wanted = read_request(request, Offers([tmp_path]))
    path = tmp_path / "recipe.yml"
    path.write_text(json.dumps(wanted.recipe()))
    assert sorted(plan(load_recipe(path)).models) == sorted(tmp_path.glob("*.gguf"))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_planned_as_the_page_begins(
    offers: Offers, method: str, tmp_path: Path
) -> None:
    (told,) = (one for one in describe_methods()["methods"] if one["name"] == method)
    start = {one["name"]: one["default"] for one in told["parameters"] if one["of_model"]}
    shared = {one["name"]: one["default"] for one in told["parameters"] if not one["of_model"]}
    names = ["expert-a", "delta-b"] if told["base"] != "none" else ["expert-a", "base"]
    if told["most"] == 1:
        names = names[:1]
    wanted = ask(
        offers,
        method=method,
        base=None if told["base"] == "none" else "0/base.gguf",
        models=[taken(name, **start) for name in names],
        parameters=shared,
    )
    path = tmp_path / "recipe.yml"
    path.write_text(json.dumps(wanted.recipe()))
    recipe = load_recipe(path, strict=True)
    assert recipe.method == method
    assert plan(recipe).jobs


def test_sliders_begin_inside_their_span() -> None:
    for method in describe_methods()["methods"]:
        for one in method["parameters"]:
            if one["span"] is not None:
                least, most = one["span"]
                assert least <= one["default"] <= most, (method["name"], one["name"])
            assert one["default"] is not None, (method["name"], one["name"])


@pytest.mark.parametrize(
    ("document", "status", "sentence"),
    [
        ({"method": "magic"}, 400, "unknown merge method 'magic'"),
        ({"type": "Q9"}, 400, "the type 'Q9' is none of keep"),
        ({"base": "0/delta-b.gguf"}, 404, "there is no file"),
        ({"models": [taken("expert-a"), taken("expert-a")]}, 400, "taken twice"),
        ({"models": [taken("base")]}, 400, "taken twice"),
        ({"models": [taken("nothing")]}, 404, "there is no file '0/nothing.gguf'"),
        ({"base": None, "method": "linear", "models": [taken("delta-b")]}, 400, "a delta needs"),
        ({"models": [taken("expert-a", density=2)]}, 400, "a number from 0 to 1"),
        ({"models": [taken("expert-a", magic=2)]}, 400, "has no parameter 'magic'"),
        ({"parameters": {"weight": 2}}, 400, "has no parameter 'weight'"),
        ({"parameters": {"lambda": "much"}}, 400, "the parameter lambda is 'much'"),
        ({"parameters": {"rescale": "l3"}}, 400, "one of true, false, l1"),
    ],
)
def test_what_is_not_possible_is_refused(
    offers: Offers, document: Document, status: int, sentence: str
) -> None:
    with pytest.raises(Refusal) as caught:
        ask(offers, **document)
    assert caught.value.status == status
    assert sentence in str(caught.value)


def test_values_keep_their_kind(offers: Offers) -> None:
    wanted = ask(offers, parameters={"normalize": False, "rescale": "l1", "lambda": 0.5})
    assert wanted.parameters == {"normalize": False, "rescale": "l1", "lambda": 0.5}
    assert wanted.parameters["normalize"] is False
    assert wanted.options() == ["--type", "keep", "--seed", "0"]
    assert TYPES[0] == "keep"


@pytest.mark.parametrize("name", ["", " x", "../x", "a/b", "x" * 49, "a\nb", "-x", ".x", "ä"])
def test_a_name_is_plain(name: str) -> None:
    with pytest.raises(ValidationError):
        MergeRequest.model_validate({"method": "ties", "models": [taken("x")], "name": name})


def test_questions_of_a_comparison_have_names_that_eval_takes(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.jsonl" for i in range(5)]
    names = ("a=b", "ward", "ward", "mmlu", "ward")
    offers = [
        Offer("", name, path, "questions", 0) for name, path in zip(names, paths, strict=True)
    ]
    named = name_tasks(offers)
    assert list(named) == ["a-b", "ward", "ward 2", "mmlu 2", "ward 3"]
    assert list(named.values()) == paths
    texts = [f"{name}={path}" for name, path in named.items()]
    for path in paths:
        path.write_text('{"question": "x", "options": ["a", "b"], "answer": 0}\n')
    assert [task.name for task in read_tasks(texts, None, [], None, 0)] == list(named)
