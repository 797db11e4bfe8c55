"""A recipe in words: for `plan`, `verify` and the record that an auditor reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path, PurePath
from typing import Any

from edgemerge.finding.cache import folder_name
from edgemerge.methods.method import Method
from edgemerge.methods.table import METHODS
from edgemerge.types import Recipe

__all__ = ["describe_recipe", "describe_stages", "recipe_document"]

DEFAULT, PRESET, IDLE = " (default)", " (preset)", " (without effect)"
QUIET = {"int8_mask"}  # without effect
WORDS = {"base": "the base", "union": "all models"}  # tokenizer_source -> whose


def recipe_document(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as the plain types that a merged file's `edgemerge.recipe` has."""
    return asdict(recipe)


def describe_recipe(document: Mapping[str, Any], transplant: str = "") -> list[str]:
    """Say a recipe in lines: the method with its settings, then each model with its own.

    Parameters
    ----------
    document : mapping
        As of `recipe_document`, or as read from a merged file, which another program may have changed:
        what is not as expected is left out.
    transplant : str
        `Provenance.transplant`, where the model got other tokens: this is said in place of the method.

    Returns
    -------
    list of str
        `ties: density 0.5, lambda 1 (default)`, then `base ward.gguf`, `model cardio.gguf: weight 0.5`.
    """
    if mixture := _table(document.get("mixture")):
        return _describe_mixture(mixture, document.get("seed"))
    name = str(document.get("method", "?"))
    method = METHODS.get(name)
    common = _table(document.get("parameters"))
    fallback = _table(document.get("defaults"))
    known = {p.name: p.default for p in method.parameters} if method is not None else {}
    slices = _slices(document)
    own = {key for part in slices for model in part for key in model[1]}
    idle = _idle(method, [common, fallback, *(model[1] for part in slices for model in part)])
    parts = [f"{key} {_rules(rules)}{IDLE if key in idle else ''}" for key, rules in common.items()]
    for key, value in known.items():
        if key in common or key in own or key in QUIET or key in idle:
            continue
        mark = DEFAULT
        if key in fallback:
            plain = _rules(
                1.0 if value is None else value
            )  # only a weight has no default of its own
            value = fallback[key]
            mark = DEFAULT if _rules(value) == plain else PRESET
        if value is not None:
            parts.append(f"{key} {_rules(value)}{mark}")
    parts += _switches(document, method)
    lines = [f"{name}: {', '.join(parts)}" if parts else name]
    if transplant:
        lines = [f"transplant: {transplant}"]
    if isinstance(base := document.get("base"), str | PurePath):
        lines.append(f"base {_name(base)}")
    parts_of_slices = document.get("slices")
    for part in parts_of_slices if isinstance(parts_of_slices, list | tuple) else ():
        if isinstance(base := _table(part).get("base"), str | PurePath):
            lines.append(f"base of a slice {_name(base)}")
    for part in slices:
        lines += [f"{label}: {words}" if words else label for label, words in map(_model, part)]
    return list(dict.fromkeys(lines))


def _idle(method: Method | None, levels: Sequence[Mapping[str, Any]]) -> set[str]:
    """Name the parameters whose switch no level turns on."""
    return {
        parameter.name
        for parameter in (method.parameters if method is not None else ())
        if parameter.needs and not any(_is_on(level.get(parameter.needs)) for level in levels)
    }


def _is_on(rules: object) -> bool:
    """Tell whether a switch, or any of its rules or steps, is on."""
    if isinstance(rules, list | tuple):
        return any(map(_is_on, rules))
    return _is_on(rules.get("value")) if isinstance(rules, Mapping) else rules in (True, 1)


def _describe_mixture(mixture: Mapping[str, Any], seed: object) -> list[str]:
    """Say a mixture of experts: `mixture: 2 experts for a token, gate_mode random`, then each model."""
    per_token, gate_mode = mixture.get("experts_per_token"), mixture.get("gate_mode")
    drawn = f", seed {seed}" if "random" in str(gate_mode) else ""
    lines = [f"mixture: {per_token} experts for a token, gate_mode {gate_mode}{drawn}"]
    lines.append(f"base {_name(mixture.get('base', '?'))}")
    experts = mixture.get("experts")
    for entry in experts if isinstance(experts, list | tuple) else ():
        expert = _table(entry)
        said = [repr(text) for text in _texts(expert, "positive_prompts")]
        said += [f"not {text!r}" for text in _texts(expert, "negative_prompts")]
        if (scale := expert.get("residual_scale")) is not None:
            said.append(f"residual_scale {_value(scale)}")
        label = f"expert {_name(expert.get('path', '?'))}"
        lines.append(f"{label}: {', '.join(said)}" if said else label)
    return lines


def _texts(table: Mapping[str, Any], key: str) -> list[str]:
    found = table.get(key)
    return [str(text) for text in found] if isinstance(found, list | tuple) else []


def describe_stages(text: str) -> list[str]:
    """Say what the stages of a merge were, each line with the stage's name.

    Parameters
    ----------
    text : str
        A merged file's `edgemerge.stages`, which another program may have changed; empty without stages.
    """
    try:
        stages = json.loads(text) if text else []
        documents = [(stage["name"], json.loads(stage["recipe"])) for stage in stages]
    except (ValueError, TypeError, LookupError, RecursionError):
        return [f"stages {text}"]
    return [
        f"stage {name}: {line}"
        for name, document in documents
        for line in describe_recipe(_table(document))
    ]


def _switches(document: Mapping[str, Any], method: Method | None) -> Iterator[str]:
    align = document.get("align")
    if align == "full":
        yield "heads, values and neurons aligned"
    elif align:
        yield f"heads aligned: {align}"
    elif method is not None and method.align != "off":
        yield f"heads aligned: {method.align}{DEFAULT}"
    if document.get("neurons") and align != "full":
        yield "neurons matched"
    if seed := document.get("seed"):
        yield f"seed {seed}"
    if isinstance(source := document.get("tokenizer_source"), str):
        yield f"tokens of {WORDS.get(source, PurePath(source).name)}"
    if rules := _table(document.get("tokens")):
        yield f"own rules for {len(rules)} token{'s' * (len(rules) > 1)}"
    if multiple := document.get("pad_to_multiple_of"):
        yield f"rows of tokens padded to a multiple of {multiple}"


def _slices(document: Mapping[str, Any]) -> list[list[tuple[str, dict[str, Any]]]]:
    """List the models of each slice as (name with its layers, parameters)."""
    slices = document.get("slices")
    parts = []
    for part in slices if isinstance(slices, list | tuple) else ():
        inputs = _table(part).get("inputs")
        models = []
        for entry in inputs if isinstance(inputs, list | tuple) else ():
            table = _table(entry)
            label = f"model {_name(table.get('path', '?'))}"
            if isinstance(layers := table.get("layer_range"), list | tuple) and len(layers) == 2:
                label += f" layers {layers[0]} to {layers[1]}"
            own = {**_table(_table(part).get("parameters")), **_table(table.get("parameters"))}
            if isinstance(matrix := table.get("imatrix"), str | PurePath):
                own["importances of"] = PurePath(matrix).name
            models.append((label, own))
        parts.append(models)
    return parts


def _model(model: tuple[str, Mapping[str, Any]]) -> tuple[str, str]:
    label, parameters = model
    return label, ", ".join(f"{key} {_rules(rules)}" for key, rules in parameters.items())


def _rules(rules: object) -> str:
    """Write a parameter: `0.5`, `0.2 to 0.8 over the layers`, `0.3 for mlp, else 0.5`."""
    if not isinstance(rules, list | tuple) or not all(isinstance(r, Mapping) for r in rules):
        return _value(rules)
    said = [
        _value(rule.get("value"))
        if rule.get("filter") is None
        else f"{_value(rule.get('value'))} for {rule['filter']}"
        for rule in rules
    ]
    if len(said) > 1 and rules[-1].get("filter") is None:
        said[-1] = f"else {said[-1]}"
    return ", ".join(said)


def _value(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"{' to '.join(map(_value, value))} over the layers"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _name(path: object) -> str:
    return folder_name(Path(str(path)))


def _table(value: object) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}
