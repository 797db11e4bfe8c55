"""What is a name on the hub, and which files of a repository are chosen."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgemerge.errors import RecipeError
from edgemerge.finding.files import choose_files
from edgemerge.finding.names import HubName, read_hub_name
from edgemerge.recipe.recipe import make_recipe

FOLDER = [
    "README.md",
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]
GGUFS = [
    "README.md",
    "m-IQ4_0.gguf",
    "m-Q4_0.gguf",
    "m-Q4_K_M.gguf",
    "m.Q8_0.gguf",
    "mmproj-F16.gguf",
]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/name", HubName("org/name")),
        ("Qwen/Qwen2.5-0.5B", HubName("Qwen/Qwen2.5-0.5B")),
        ("org/name@v1.0", HubName("org/name", "v1.0")),
        ("org/name@refs/pr/3", HubName("org/name", "refs/pr/3")),
        ("org/name:Q4_K_M", HubName("org/name", None, "Q4_K_M")),
        ("org/name:UD-Q4_K_XL", HubName("org/name", None, "UD-Q4_K_XL")),
        ("org/name:Q4_0@main", HubName("org/name", "main", "Q4_0")),
        ("org/name@main:Q4_0", HubName("org/name", "main", "Q4_0")),
        ("org/name:A@main:B", None),
        ("name", None),
        ("./org/name", None),
        ("/org/name", None),
        ("org/name/more", None),
        ("org/na..me", None),
        ("org/na--me", None),
        ("org/model.gguf", None),
        ("recipes/merge.yml", None),
        ("~/models", None),
        (f"org/{'n' * 96}", None),
        ("org/name\n", None),
    ],
)
def test_a_name_has_an_owner_and_perhaps_a_revision_and_a_type(
    text: str, name: HubName | None
) -> None:
    assert read_hub_name(text) == name
    if name is not None:
        assert read_hub_name(str(name)) == name


def test_a_revision_beside_the_name_counts_where_it_has_none() -> None:
    assert read_hub_name("org/name", "v2") == HubName("org/name", "v2")
    assert read_hub_name("org/name@v1", "v2") == HubName("org/name", "v1")


def test_a_folder_s_files_come_small_ones_first_and_no_pickle_is_among_them() -> None:
    others = ["pytorch_model.bin", "onnx/model.onnx", "tf_model.h5", "consolidated.safetensors"]
    others += ["original/model.safetensors", "training_args.bin", "image.png", "model.gguf"]
    small = sorted(set(FOLDER) - {"model.safetensors"})
    assert choose_files(HubName("a/b"), FOLDER + others) == [*small, "model.safetensors"]


def test_shards_are_taken_where_there_is_no_whole_file() -> None:
    shards = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    there = ["config.json", "model.safetensors.index.json", *shards]
    assert choose_files(HubName("a/b"), there) == there


def test_a_folder_of_templates_belongs_to_the_model() -> None:
    there = [*FOLDER, "chat_template.jinja", "additional_chat_templates/tool_use.jinja"]
    assert set(there) == set(choose_files(HubName("a/b"), there))


@pytest.mark.parametrize("wanted", ["Q4_0", "q4_k_m", "Q8_0"])
def test_a_type_names_a_gguf(wanted: str) -> None:
    (file,) = choose_files(HubName("a/b", None, wanted), GGUFS)
    assert file.lower().removesuffix(".gguf").removeprefix("m")[1:] == wanted.lower()


def test_a_type_names_all_parts_of_a_split_gguf() -> None:
    parts = [f"Q4_K_M/m-Q4_K_M-{i:05}-of-00002.gguf" for i in (1, 2)]
    assert choose_files(HubName("a/b", None, "Q4_K_M"), [*parts, "m-Q8_0.gguf"]) == parts


def test_the_only_gguf_needs_no_type() -> None:
    assert choose_files(HubName("a/b"), ["README.md", "m.gguf", "mmproj.gguf"]) == ["m.gguf"]


@pytest.mark.parametrize(
    ("name", "there", "sentence"),
    [
        (
            HubName("a/b"),
            GGUFS,
            "a/b has 4 GGUF models; choose one, as in a/b:TYPE, of IQ4_0, Q4_0,",
        ),
        (
            HubName("a/b", None, "Q2_K"),
            GGUFS,
            "a/b has no GGUF of the type Q2_K; it has IQ4_0, Q4_0,",
        ),
        (
            HubName("a/b", None, "Q4_0"),
            ["chat-Q4_0.gguf", "base-Q4_0.gguf"],
            "a/b has 2 GGUF models of Q4_0; choose one",
        ),
        (HubName("a/b"), ["config.json", "pytorch_model.bin"], "pickle only (pytorch_model.bin)"),
        (HubName("a/b"), ["README.md"], "a/b has neither safetensors with a config.json nor GGUF"),
    ],
)
def test_what_cannot_be_chosen_is_said(name: HubName, there: list[str], sentence: str) -> None:
    with pytest.raises(RecipeError) as error:
        choose_files(name, there)
    assert sentence in str(error.value)


def test_a_linked_file_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's cache has links by the files' names, to files by their hashes."""
    folder = tmp_path
    monkeypatch.chdir(folder)
    (folder / "a").mkdir()
    (folder / "blobs").mkdir()
    (folder / "blobs" / "f00d").write_bytes(b"GGUF")
    (folder / "m-00001-of-00002.gguf").symlink_to(folder / "blobs" / "f00d")
    (folder / "link").symlink_to(folder / "a")
    recipe = make_recipe("linear", [("m-00001-of-00002.gguf", 1.0), ("link", 1.0)])
    paths = [model.path for part in recipe.slices for model in part.inputs]
    assert paths == [folder / "m-00001-of-00002.gguf", folder / "a"]
    odd = folder / os.fsdecode(b"m\xe9d")
    odd.mkdir()
    (folder / "plain").symlink_to(odd)
    with pytest.raises(RecipeError, match="is not UTF-8; rename it"):
        make_recipe("linear", [("plain", 1.0)])
