"""Names on the hub: huggingface_hub against a hub on this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from edgemerge.errors import RecipeError
from edgemerge.finding.cache import hub_origin
from edgemerge.finding.finder import Finder
from edgemerge.recipe.recipe import load_recipe, make_recipe
from tests.support.local_hub import COMMIT, OTHER, LocalHub, blob_of, serve_hub

constants = pytest.importorskip("huggingface_hub.constants")
DOWNLOADS = Finder(download=True)
N_BYTES = 24_000_000  # of weights: more than a socket keeps


@pytest.fixture(name="hub")
def _hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A hub, and a cache that is empty."""
    cache = tmp_path / "cache"
    with serve_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_HUB_CACHE", str(cache))
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.chdir(tmp_path)
        yield hub


@pytest.fixture(name="model")
def _model(tmp_path: Path) -> Path:
    """A repository of safetensors, with what no merge reads."""
    return make_model(tmp_path / "repository", 1)


def make_model(folder: Path, seed: int, n_bytes: int = 4096) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"seed": seed}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02 a pickle")
    rng = np.random.default_rng(seed)
    save_file({"x": rng.integers(0, 255, n_bytes, np.uint8)}, folder / "model.safetensors")
    return folder


def refusal(finder: Finder, text: str, revision: str | None = None) -> str:
    with pytest.raises(RecipeError) as error:
        finder.find_on_hub(text, revision)
    return str(error.value)


def test_nothing_is_fetched_unasked_and_the_error_has_the_command(
    hub: LocalHub, model: Path
) -> None:
    hub.add("org/name", model)
    assert refusal(Finder(), "org/name") == (
        "no file or folder 'org/name', and the hub's cache has no whole model of that name; give "
        "--download to fetch it, or run: hf download org/name"
    )
    assert refusal(Finder(), "org/name", "v1").endswith("hf download org/name --revision v1")
    assert refusal(Finder(), "org/name:Q4_0").endswith(
        "hf download org/name --include '*Q4_0*.gguf'"
    )
    assert hub.requests == []


def test_a_download_brings_what_is_read_into_the_cache(hub: LocalHub, model: Path) -> None:
    hub.add("org/name", model)
    found = DOWNLOADS.find_on_hub("org/name")
    assert found is not None
    assert hub.fetched() == ["config.json", "tokenizer.json", "model.safetensors"]
    assert sorted(p.name for p in found.iterdir()) == sorted(hub.fetched())
    for name in hub.fetched():
        assert (found / name).read_bytes() == (model / name).read_bytes()
    assert (str(hub_origin(found)), found.is_absolute()) == (f"org/name@{COMMIT}", True)
    hub.requests.clear()
    assert Finder().find_on_hub("org/name") == found
    assert Finder().find_on_hub("org/name", COMMIT) == found
    assert hub.requests == []


def test_huggingface_hub_finds_what_was_fetched(hub: LocalHub, model: Path) -> None:
    from huggingface_hub import snapshot_download

    hub.add("org/name", model)
    found = DOWNLOADS.find_on_hub("org/name")
    files = ["config.json", "model.safetensors"]
    theirs = snapshot_download(
        "org/name", cache_dir=constants.HF_HUB_CACHE, local_files_only=True, allow_patterns=files
    )
    assert Path(theirs) == found


def test_a_revision_is_fetched_and_found_as_such(
    hub: LocalHub, model: Path, tmp_path: Path
) -> None:
    hub.add("org/name", model)
    hub.add_revision("org/name", "v2", make_model(tmp_path / "newer", 2))
    newer = DOWNLOADS.find_on_hub("org/name@v2")
    assert newer is not None
    assert json.loads((newer / "config.json").read_text()) == {"seed": 2}
    assert str(hub_origin(newer)) == f"org/name@{OTHER}"
    assert Finder().find_on_hub("org/name", "v2") == newer
    assert "no whole model of that name" in refusal(Finder(), "org/name")
    wanted = "org/name has no revision 'v3' on the hub; check the revision"
    assert refusal(DOWNLOADS, "org/name@v3") == wanted


def test_a_yes_at_a_terminal_fetches(hub: LocalHub, model: Path) -> None:
    hub.add("org/name", model)
    asked: list[str] = []

    def ask(question: str) -> bool:
        assert hub.requests == []
        asked.append(question)
        return len(asked) > 1

    assert "--download" in refusal(Finder(ask=ask), "org/name")
    assert Finder(ask=ask).find_on_hub("org/name") is not None
    assert asked[0] == "org/name is not on this machine. Fetch it from the hub?"


class StopAsSoonAsBytesCome:
    """Progress of a download that is broken off."""

    def __enter__(self) -> StopAsSoonAsBytesCome:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, done: int, total: int) -> None:
        if done > N_BYTES // 4:
            raise KeyboardInterrupt


def test_a_broken_download_goes_on_where_it_was(hub: LocalHub, tmp_path: Path) -> None:
    model = make_model(tmp_path / "large", 3, N_BYTES)
    hub.add("org/large", model)
    hub.pause_after = N_BYTES // 2
    with pytest.raises(KeyboardInterrupt):
        Finder(download=True, show_progress=lambda _: StopAsSoonAsBytesCome()).find_on_hub(
            "org/large"
        )
    assert "no whole model of that name" in refusal(Finder(), "org/large")
    hub.requests.clear()
    hub.goes_on.set()
    told: list[tuple[int, int]] = []
    found = Finder(download=True, show_progress=lambda _: Told(told)).find_on_hub("org/large")
    assert found is not None
    (begun,) = [
        wanted for method, path, wanted in hub.requests if "safetensors" in path and method == "GET"
    ]
    assert begun is not None
    assert int(begun.removeprefix("bytes=").rstrip("-")) > N_BYTES // 4
    assert (found / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert all(done <= total for done, total in told)
    assert not list((found.parents[1] / "blobs").glob("*.incomplete"))


class Told:
    """Progress that is noted."""

    def __init__(self, calls: list[tuple[int, int]]) -> None:
        self.calls = calls

    def __enter__(self) -> Told:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, done: int, total: int) -> None:
        self.calls.append((done, total))


def test_a_damaged_beginning_is_not_kept(hub: LocalHub, model: Path) -> None:
    hub.add("org/name", model)
    blobs = Path(constants.HF_HUB_CACHE) / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    begun = blobs / f"{blob_of(model / 'model.safetensors')}.edgemerge.incomplete"
    begun.write_bytes(b"wrong")
    assert "model.safetensors arrived damaged" in refusal(DOWNLOADS, "org/name")
    assert DOWNLOADS.find_on_hub("org/name") is not None


def test_a_model_with_a_missing_shard_is_not_whole(hub: LocalHub, tmp_path: Path) -> None:
    model = tmp_path / "shards"
    model.mkdir()
    names = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    (model / "config.json").write_text("{}")
    index = {"weight_map": {"a": names[0], "b": names[1]}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    for i, name in enumerate(names):
        save_file({"ab"[i]: np.zeros(4, np.float32) + i}, model / name)
    hub.add("org/shards", model)
    found = DOWNLOADS.find_on_hub("org/shards")
    assert found is not None
    assert Finder().find_on_hub("org/shards") == found
    (found / names[1]).unlink()
    assert "no whole model of that name" in refusal(Finder(), "org/shards")
    hub.requests.clear()
    assert DOWNLOADS.find_on_hub("org/shards") == found
    assert hub.fetched() == []  # the blob is there, and the link is made anew


def test_a_gguf_of_a_type_is_fetched_alone(hub: LocalHub, tmp_path: Path) -> None:
    folder = tmp_path / "ggufs"
    folder.mkdir()
    for name in ("m-Q4_K_M.gguf", "m-Q8_0.gguf", "README.md"):
        (folder / name).write_bytes(name.encode())
    hub.add("org/name-GGUF", folder)
    found = DOWNLOADS.find_on_hub("org/name-GGUF:q4_k_m")
    assert found is not None
    assert (found.name, found.read_bytes()) == ("m-Q4_K_M.gguf", b"m-Q4_K_M.gguf")
    assert hub.fetched() == ["m-Q4_K_M.gguf"]
    assert Finder().find_on_hub("org/name-GGUF:Q4_K_M") == found
    assert Finder().find_on_hub("org/name-GGUF") == found  # the only one here
    assert "no whole model" in refusal(Finder(), "org/name-GGUF:Q8_0")
    assert DOWNLOADS.find_on_hub("org/name-GGUF:Q8_0") is not None
    several = (
        "org/name-GGUF has 2 GGUF models; choose one, as in org/name-GGUF:TYPE, of Q4_K_M, Q8_0"
    )
    assert refusal(Finder(), "org/name-GGUF") == several


def test_the_only_gguf_of_the_cache_does_not_stand_for_a_directory_of_the_hub(
    hub: LocalHub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "m-Q4_K_M.gguf").write_bytes(b"m-Q4_K_M.gguf")
    hub.add("org/name", model)
    gguf = DOWNLOADS.find_on_hub("org/name:Q4_K_M")
    assert gguf is not None
    said: list[str] = []
    doubt = "org/name is taken to be m-Q4_K_M.gguf, the only GGUF of it in the hub's cache"
    finder = Finder(say=said.append)
    assert finder.find_on_hub("org/name") == finder.find_on_hub("org/name") == gguf
    assert said == [f"{doubt}; --download asks the hub for more"]
    said.clear()
    with monkeypatch.context() as away:
        away.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        assert Finder(download=True, say=said.append).find_on_hub("org/name") == gguf
        assert said.pop().startswith(f"{doubt}, and the hub cannot be reached")
        away.setattr(constants, "HF_HUB_OFFLINE", True)
        assert Finder(download=True, say=said.append).find_on_hub("org/name") == gguf
        assert said.pop() == doubt
    blob = gguf.resolve()
    gguf.unlink()
    shutil.copyfile(
        blob, gguf
    )  # a copy of a cache has no links, and all of it would be fetched again
    assert Finder(download=True, say=said.append).find_on_hub("org/name") == gguf
    assert said.pop() == doubt
    gguf.unlink()
    gguf.symlink_to(blob)
    hub.add_revision("org/name", "main", make_model(tmp_path / "newer", 2))
    folder = Finder(download=True, say=said.append).find_on_hub("org/name")
    assert folder == gguf.parent  # of the commit that the cache has
    assert (folder / "config.json").read_bytes() == (model / "config.json").read_bytes()
    assert Finder(say=said.append).find_on_hub("org/name") == folder
    assert Finder(say=said.append).find_on_hub("org/name:Q4_K_M") == gguf
    assert said == []


def test_a_tokenizer_that_the_cache_lacks_is_fetched(hub: LocalHub, model: Path) -> None:
    hub.add("org/name", model)
    found = DOWNLOADS.find_on_hub("org/name")
    assert found is not None
    (found / "tokenizer.json").unlink()  # as another program leaves it out
    said: list[str] = []
    assert Finder(say=said.append).find_on_hub("org/name") == found
    doubt = "the hub's cache has no tokenizer of org/name; --download asks the hub for more"
    assert said == [doubt]
    assert DOWNLOADS.find_on_hub("org/name") == found
    assert (found / "tokenizer.json").read_text() == "{}"


def test_a_gated_model_needs_a_token(
    hub: LocalHub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/gated", model, is_gated=True)
    assert refusal(DOWNLOADS, "org/gated") == (
        f"org/gated is gated: ask for access on {hub.url}/org/gated, then log in with: hf auth login "
        "(or set HF_TOKEN)"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert DOWNLOADS.find_on_hub("org/gated") is not None


def test_an_unknown_model_is_said(hub: LocalHub) -> None:
    assert refusal(DOWNLOADS, "org/none").startswith(
        "the hub has no model org/none, or it is private;"
    )


def test_offline_variables_forbid_to_fetch(
    hub: LocalHub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/name", model)
    hub.add("org/other", model)
    found = DOWNLOADS.find_on_hub("org/name")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert DOWNLOADS.find_on_hub("org/name") == found
    assert "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids" in refusal(DOWNLOADS, "org/other")
    assert hub.requests == []


def test_a_hub_that_is_away_is_said(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    sentence = refusal(DOWNLOADS, "org/name")
    assert sentence.startswith("the hub cannot be reached at http://127.0.0.1:9 (")
    assert sentence.endswith("goes on where this one stopped")


def test_a_full_disk_is_said_before_anything_is_fetched(
    hub: LocalHub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/name", model)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    sentence = refusal(DOWNLOADS, "org/name")
    assert "org/name needs" in sentence
    assert "set HF_HUB_CACHE to a folder on another disk" in sentence
    assert hub.fetched() == []


def test_without_the_extra_the_error_names_it(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgemerge.finding.cache.find_spec", lambda _: None)
    assert refusal(DOWNLOADS, "org/name") == (
        "no file or folder 'org/name'; if it is a model of the hub, pip install 'edgemerge[hub]' "
        "finds it there"
    )


def test_a_folder_of_models_comes_before_the_cache(
    hub: LocalHub, model: Path, tmp_path: Path
) -> None:
    hub.add("org/name", model)
    DOWNLOADS.find_on_hub("org/name")
    finder = Finder(tmp_path / "models")
    for place in ("name", "org/name"):
        (tmp_path / "models" / place).mkdir(parents=True)
        recipe = make_recipe("linear", [("org/name@v1", None)], finder=finder)
        assert recipe.models() == (tmp_path / "models" / place,)
        assert "the revision 'v1' does not apply" in recipe.notes[0]


def test_a_type_is_looked_for_in_the_folder_of_models(tmp_path: Path) -> None:
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    for file_type in ("Q4_0", "Q8_0"):
        (folder / f"m-{file_type}.gguf").touch()
    finder = Finder(tmp_path)
    assert finder.find_path("org/name:Q8_0") == folder / "m-Q8_0.gguf"
    assert finder.find_path("org/name:Q2_K") is None
    with pytest.raises(RecipeError, match="org/name has 2 GGUF models"):
        finder.find_path("org/name")


def test_a_recipe_s_models_are_looked_for_beside_it_first_and_then_in_the_cache(
    hub: LocalHub, model: Path, tmp_path: Path
) -> None:
    hub.add("org/name", model)
    hub.add_revision("org/name", "v2", model)
    path = tmp_path / "recipes" / "merge.yml"
    path.parent.mkdir()
    path.write_text(
        "merge_method: linear\nmodels:\n- {model: org/name@v2, parameters: {weight: 1}}\n"
        "- {model: {model: {path: org/name, revision: main}}, parameters: {weight: 1}}\n"
    )
    with pytest.raises(
        RecipeError, match=r"models\[0\]\.model: no file or folder 'org/name'.*--download"
    ):
        load_recipe(path)
    recipe = load_recipe(path, finder=DOWNLOADS)
    assert [str(hub_origin(p)) for p in recipe.models()] == [
        f"org/name@{OTHER}",
        f"org/name@{COMMIT}",
    ]
    assert recipe.notes == ()
    (path.parent / "org" / "name").mkdir(parents=True)
    assert load_recipe(path).models() == (path.parent / "org" / "name",)
