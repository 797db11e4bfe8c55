"""hf:// addresses, against a hub on this machine whose large files lie on another server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgemerge import merge, open_model
from edgemerge.errors import FormatError, RecipeError
from edgemerge.finding.cache import hub_origin
from edgemerge.finding.finder import Finder
from edgemerge.recipe.recipe import load_recipe, make_recipe
from edgemerge.remote import stand_ins
from edgemerge.types import Recipe
from tests.support.crashing import write_models
from tests.support.local_hub import COMMIT, OTHER, LocalHub, serve_hub

constants = pytest.importorskip("huggingface_hub.constants")
STREAMS = Finder(streams=True)


@pytest.fixture(name="hub")
def _hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A hub that sends who wants a large file to its store, and a user with a token."""
    with serve_hub() as hub:
        hub.store = hub.url.replace("127.0.0.1", "localhost")
        cache = tmp_path / "cache"
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_HUB_CACHE", str(cache))
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub
        stand_ins.remove_all()


def linear(models: list[str], finder: Finder) -> Recipe:
    return make_recipe("linear", [(one, None) for one in models], out_type="Q8_0", finder=finder)


def test_a_merge_from_the_hub_has_the_bytes_of_one_of_its_cache(
    hub: LocalHub, models_dir: Path, tmp_path: Path
) -> None:
    for name in ("expert-a", "expert-b"):
        hub.add(f"org/{name}", models_dir / name, is_gated=True)
    names = ["org/expert-a", "org/expert-b"]
    there = linear([f"hf://{name}@main" for name in names], STREAMS)
    assert not (tmp_path / "cache").exists()
    found = merge(there, tmp_path / "there.gguf", threads=2)
    assert {login for path, login in hub.tokens if path.startswith("/store/")} == {None}
    assert {login for path, login in hub.tokens if path.startswith("/org/")} == {"Bearer hf_secret"}
    assert b"hf_secret" not in (tmp_path / "there.gguf").read_bytes()
    hub.store = None
    here = linear(names, Finder(download=True))
    assert merge(here, tmp_path / "here.gguf").sha256 == found.sha256
    with (tmp_path / "there.gguf").open("rb") as file:
        assert f"org/expert-a@{COMMIT}".encode() in file.read(1 << 20)


def test_revision_type_and_file_choose_what_is_read(hub: LocalHub, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    written = write_models(models)
    (tmp_path / "one" / "quants").mkdir(parents=True)
    (tmp_path / "two").mkdir()
    shutil.copy(written["a"], tmp_path / "one" / "quants" / "model-F32.gguf")
    shutil.copy(written["base"], tmp_path / "one" / "model-F16.gguf")
    shutil.copy(written["b"], tmp_path / "two" / "model-F32.gguf")
    hub.add("org/name", tmp_path / "one")
    hub.add_revision("org/name", "v2", tmp_path / "two")

    def sum_of(text: str, revision: str | None = None) -> str:
        found = STREAMS.find_on_hub(text, revision)
        assert found is not None
        origin = hub_origin(found)
        assert origin is not None
        assert origin.commit == (OTHER if "v2" in (text + str(revision)) else COMMIT)
        recipe = make_recipe("passthrough", [(str(found), None)], out_type="keep")
        return merge(recipe, tmp_path / "out.gguf", force=True).sha256[:8]

    sums = {sum_of("hf://org/name:F32"), sum_of("hf://org/name/quants/model-F32.gguf")}
    assert len(sums) == 1
    assert sum_of("hf://org/name/model-F16.gguf") not in sums
    newer = {sum_of("hf://org/name@v2"), sum_of("hf://org/name", "v2")}
    assert len(newer) == 1
    assert not newer & sums
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        "merge_method: passthrough\nslices: [{sources: [{model: {model: {path: 'hf://org/name', "
        "revision: v2}}, layer_range: [0, 1]}]}]\n"
    )
    assert hub_origin(load_recipe(recipe, finder=STREAMS).models()[0]) is not None
    refusals = {
        "hf://org/name/none.gguf": "org/name has no GGUF file none.gguf; it has model-F16.gguf, quants/",
        "hf://org/none": "the hub has no model org/none",
        "hf://org/name@v9": "org/name has no revision 'v9'",
        "hf://name": "an address of the hub is hf://ORG/NAME",
    }
    for text, start in refusals.items():
        with pytest.raises(RecipeError) as error:
            STREAMS.find_on_hub(text)
        assert str(error.value).startswith(start)


def test_a_listed_file_that_may_not_be_read_is_not_left_out(
    hub: LocalHub, models_dir: Path
) -> None:
    hub.add("org/name", models_dir / "expert-a")
    hub.repositories["org/name"].refused = frozenset({"tokenizer.json"})
    with pytest.raises(FormatError, match=r"tokenizer\.json: may not be read \(403\)"):
        STREAMS.find_on_hub("hf://org/name")


def test_names_that_lead_out_of_the_folder_are_refused(hub: LocalHub, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "a\n.gguf").write_text("text")
    hub.add("org/name", folder)
    with pytest.raises(RecipeError, match=r"has a file 'a\\n\.gguf', which no folder can have"):
        STREAMS.find_model("hf://org/name")
    hub.repositories["org/name"].revisions["main"] = ("../../../../out", folder)
    with pytest.raises(RecipeError, match=r"org/name has no commit on http.*; check HF_ENDPOINT"):
        STREAMS.find_model("hf://org/name")


def test_an_error_names_the_model_by_its_address(hub: LocalHub, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "model.gguf").write_text("text")
    hub.add("org/name", tmp_path / "one")
    with pytest.raises(
        Exception, match=rf"^hf://org/name@{COMMIT}/model\.gguf: is not a GGUF file"
    ):
        open_model(STREAMS.find_model("hf://org/name"))
