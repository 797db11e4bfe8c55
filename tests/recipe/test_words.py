"""Recipes in words: what was asked, and what was left to the method."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgemerge.recipe.words import describe_recipe, describe_stages, recipe_document
from edgemerge.token_rows import TokenRule
from edgemerge.types import ModelInput, Recipe, Rule, Slice


def rule(value: Any, name: str | None = None) -> tuple[Rule, ...]:
    return (Rule(value, name),)


def test_settings_are_said_and_defaults_marked() -> None:
    recipe = Recipe(
        method="ties",
        base=Path("/models/base.gguf"),
        slices=(
            Slice(
                (
                    ModelInput(Path("/models/a.gguf"), parameters={"weight": rule(0.5)}),
                    ModelInput(Path("/models/b.gguf"), parameters={"weight": rule((0.2, 0.8))}),
                )
            ),
        ),
        parameters={"density": (Rule(0.3, "mlp"), Rule(0.5)), "lambda": rule(0.8)},
        seed=3,
    )
    assert describe_recipe(recipe_document(recipe)) == [
        "ties: density 0.3 for mlp, else 0.5, lambda 0.8, normalize on (default), "
        "rescale off (default), svc off (default), seed 3",
        "base base.gguf",
        "model a.gguf: weight 0.5",
        "model b.gguf: weight 0.2 to 0.8 over the layers",
    ]


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({}, "svc off (default)"),
        ({"svc_rank": rule(4)}, "svc_rank 4 (without effect), svc off (default)"),
        ({"svc": rule(False), "svc_rank": rule(4)}, "svc off, svc_rank 4 (without effect)"),
        ({"svc": rule(True)}, "svc on, svc_rank 16 (default)"),
        ({"svc": rule(1), "svc_rank": rule(4)}, "svc 1, svc_rank 4"),
        ({"svc": (Rule(True, "mlp"), Rule(False))}, "svc on for mlp, else off, svc_rank 16"),
        ({"svc": rule((False, True))}, "svc off to on over the layers, svc_rank 16 (default)"),
    ],
)
def test_what_a_switch_that_is_off_rules_is_not_said(
    parameters: dict[str, Any], words: str
) -> None:
    recipe = Recipe("tsv", Path("b"), (Slice((ModelInput(Path("a")),)),), parameters)
    said = describe_recipe(recipe_document(recipe))[0]
    parts = [part for part in said.removeprefix("tsv: ").split(", ") if "svc" in part]
    assert ", ".join(parts).startswith(words.split(", else")[0])
    assert ("svc_rank" in said) == ("svc_rank" in words)


def test_what_a_recipe_says_of_tokens_is_said() -> None:
    recipe = Recipe("linear", None, (Slice((ModelInput(Path("a")),)),), tokenizer_source="union")
    rules = {"<|x|>": TokenRule("zero")}
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "tokens of all models"),
        ({"tokenizer_source": "base"}, "tokens of the base"),
        ({"tokenizer_source": "/m/other.gguf"}, "tokens of other.gguf"),
        (
            {"tokens": rules, "pad_to_multiple_of": 64},
            "tokens of all models, own rules for 1 token, rows of tokens padded to a multiple of 64",
        ),
    ]
    for changes, wanted in cases:
        assert describe_recipe(recipe_document(replace(recipe, **changes)))[0].endswith(wanted)


@pytest.mark.parametrize(
    ("method", "changes", "wanted"),
    [
        ("hierarchical", {}, "heads aligned: hard (default)"),
        ("hierarchical", {"align": "soft"}, "heads aligned: soft"),
        ("linear", {"align": "full"}, "heads, values and neurons aligned"),
        ("linear", {"align": "full", "neurons": True}, "heads, values and neurons aligned"),
        ("linear", {"neurons": True}, "neurons matched"),
    ],
)
def test_what_was_aligned_is_said(method: str, changes: dict[str, Any], wanted: str) -> None:
    recipe = Recipe(method, Path("base"), (Slice((ModelInput(Path("a")),)),), **changes)
    settings = describe_recipe(recipe_document(recipe))[0]
    assert settings.endswith(wanted)
    assert settings.count("aligned") + settings.count("matched") == 1


def test_slices_name_their_layers() -> None:
    part = Slice((ModelInput(Path("a"), (0, 8)),), {"scale": rule(0.5)})
    recipe = Recipe("passthrough", None, (part, Slice((ModelInput(Path("a"), (4, 12)),))))
    assert describe_recipe(recipe_document(recipe))[1:] == [
        "model a layers 0 to 8: scale 0.5",
        "model a layers 4 to 12",
    ]


@pytest.mark.parametrize(
    "document",
    [{}, {"method": []}, {"slices": 3}, {"slices": [None, {"inputs": "ab"}]}, {"parameters": [1]}],
)
def test_a_strangers_document_is_no_reason_to_fail(document: dict[str, Any]) -> None:
    assert describe_recipe(document)


@pytest.mark.parametrize(
    "text", ["[", "[1]", '[{"name": "x"}]', "7", '[{"name": "x", "recipe": "["}]']
)
def test_stages_that_another_program_changed_are_shown_as_they_are(text: str) -> None:
    assert describe_stages(text) == [f"stages {text}"]


def test_a_base_of_a_slice_is_said() -> None:
    document = {"method": "task_arithmetic", "slices": [{"base": "b.gguf", "inputs": []}]}
    assert "base of a slice b.gguf" in describe_recipe(document)
    assert describe_stages(json.dumps([{"name": "x", "recipe": json.dumps(document)}]))[-1] == (
        "stage x: base of a slice b.gguf"
    )
