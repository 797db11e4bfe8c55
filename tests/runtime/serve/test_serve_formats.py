"""Schemas and tools: what becomes a grammar, and what an answer calls."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import TypeAdapter

from edgemerge.runtime.serve.errors import Refusal
from edgemerge.runtime.serve.formats import ResponseFormat, format_grammar, schema_grammar
from edgemerge.runtime.serve.tools import (
    Tool,
    ToolChoice,
    find_calls,
    tell_tools,
    tool_grammar,
)
from tests.runtime.chat_templates import QWEN

pytestmark = pytest.mark.llama

HERMES_TEMPLATE = QWEN + "<tool_call>"
NESTED = {"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}}
WIDE: dict[str, Any] = {
    "$ref": "#/$defs/0",
    "$defs": {str(i): {"anyOf": [{"$ref": f"#/$defs/{i + 1}"}] * 2} for i in range(20)},
}
WIDE["$defs"]["20"] = {"type": "null"}


def nest(depth: int, inner: dict[str, Any]) -> dict[str, Any]:
    return inner if depth == 0 else {"items": nest(depth - 1, inner)}


DEEP: dict[str, Any] = {
    "$ref": "#/$defs/0",
    "$defs": {str(i): nest(23, {"$ref": f"#/$defs/{i + 1}"}) for i in range(20)},
}
DEEP["$defs"]["20"] = {"type": "null"}


def test_a_schema_becomes_a_grammar_with_its_references() -> None:
    schema = {
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/place"}, "to": {"$ref": "#/$defs/place"}},
        "required": ["at"],
        "$defs": {"place": {"enum": ["ward", "home"]}},
    }
    grammar = schema_grammar(schema)
    assert "root ::=" in grammar
    assert "ward" in grammar


@pytest.mark.parametrize(
    "name",
    [
        "pattern",
        "patternProperties",
        "$defs",
        "definitions",
        "properties",
        "maxItems",
        "const",
        "enum",
    ],
)
def test_a_property_may_be_called_like_a_keyword(name: str) -> None:
    inner = {"type": "object", "properties": {name: {"const": "here"}}, "required": [name]}
    grammar = schema_grammar({"type": "object", "properties": {"in": inner}, "required": ["in"]})
    assert f'"\\"{name}\\"" space ":" space' in grammar
    assert "here" in grammar


def test_values_in_a_schema_are_no_keywords() -> None:
    values = [404, 2026, {"pattern": "^a$"}, {"definitions": 1000}]
    grammar = schema_grammar({"enum": values, "default": 404})
    for text in ("404", "2026", "pattern", "definitions", "1000"):
        assert text in grammar


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"properties": {"pattern": {"pattern": "^(a?a?)*$"}}}, "pattern: "),
        ({"properties": {"properties": {"maxItems": 10**9}}}, "maxItems: at most"),
        ({"const": [{"$ref": "http://10.0.0.1/"}]}, r"\$ref: not possible"),
        ({"default": {"a": ["x"] * 600}}, "more than 500"),
        ({"pattern": "^(a?a?)*$"}, "pattern: "),
        ({"$ref": "http://10.0.0.1/"}, r"\$ref: only"),
        ({"$ref": "#/$defs/none"}, r"\$ref: there is no"),
        ({"maxItems": 10**9}, "maxItems: at most"),
        ({"enum": ["x"] * 600}, "more than 500"),
        (NESTED, "contains itself"),
        (WIDE, "more than 500"),
        (DEEP, "nested too deep|cannot be used"),
        ({"type": "object", "properties": 7}, "cannot be used"),
    ],
)
def test_what_may_not_end_becomes_none(schema: dict[str, Any], message: str) -> None:
    wanted: Any = TypeAdapter(ResponseFormat).validate_python(
        {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    )
    with pytest.raises(Refusal, match=message) as caught:
        format_grammar(wanted)
    assert caught.value.status == 400


def test_any_json_object_is_a_format_too() -> None:
    kinds: TypeAdapter[Any] = TypeAdapter(ResponseFormat)
    assert "object" in format_grammar(kinds.validate_python({"type": "json_object"}))
    assert format_grammar(kinds.validate_python({"type": "text"})) == ""
    assert format_grammar(None) == ""


def tool(name: str = "look_up", **parameters: Any) -> Tool:
    function = {"name": name, "description": "Find a word.", "parameters": parameters or None}
    return Tool.model_validate({"type": "function", "function": function})


def test_a_call_can_be_demanded() -> None:
    tools = [tool(type="object", properties={"word": {"type": "string"}}), tool("other")]
    assert tool_grammar(tools, "auto", "") == ""
    plain = tool_grammar(tools, "required", "")
    assert "look_up" in plain
    assert "other" in plain
    hermes = tool_grammar(tools, "required", HERMES_TEMPLATE)
    assert hermes.startswith('root ::= "<tool_call>')
    choice: Any = {"type": "function", "function": {"name": "other"}}
    named = TypeAdapter(ToolChoice).validate_python(choice)
    assert "look_up" not in tool_grammar(tools, named, "")
    choice["function"]["name"] = "none"
    with pytest.raises(Refusal, match="no such tool"):
        tool_grammar(tools, TypeAdapter(ToolChoice).validate_python(choice), "")


def test_each_tool_has_definitions_of_its_own() -> None:
    tools = [
        tool(
            name,
            type="object",
            properties={"at": {"$ref": "#/$defs/place"}},
            required=["at"],
            **{"$defs": {"place": {"const": f"only {name}"}}},
        )
        for name in ("ward", "home")
    ]
    grammar = tool_grammar(tools, "required", "")
    for name in ("ward", "home"):
        assert f"only {name}" in grammar
    many = {"anyOf": [{"type": "null"}] * 100}
    with pytest.raises(Refusal, match="more than 500"):
        tool_grammar([tool(f"t{i}", **many) for i in range(6)], "required", "")


def test_tools_that_no_answer_has_to_call_may_be_any() -> None:
    assert tool_grammar([tool(pattern="^a$")], "auto", "") == ""
    with pytest.raises(Refusal, match="pattern"):
        tool_grammar([tool(pattern="^a$")], "required", "")


CALL = {"name": "look_up", "arguments": {"word": "é"}}
LLAMA = {"name": "look_up", "parameters": {"word": "é"}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>", ""),
        (f"I look.\n<tool_call>{json.dumps(CALL)}</tool_call>", "I look."),
        (f"<tool_call>\n{json.dumps(CALL)}", ""),  # cut off
        (json.dumps(LLAMA), ""),
        (f"\n {json.dumps(LLAMA)}", ""),
        (f"<|python_tag|>{json.dumps(LLAMA)}", ""),
        (f"[TOOL_CALLS] [{json.dumps(CALL)}]", ""),
        (json.dumps([CALL]), ""),
        ('look_up[ARGS]{"word": "é"}', ""),
        ('[TOOL_CALLS]look_up{"word": "é"}', ""),
        (f"```json\n{json.dumps(CALL)}\n```", ""),
        (json.dumps({"tool_calls": [{"type": "function", "function": CALL}]}), ""),
        (json.dumps({**CALL, "arguments": json.dumps(CALL["arguments"])}), ""),
    ],
)
def test_calls_are_found(text: str, said: str) -> None:
    found, calls = find_calls(text, {"look_up"})
    assert found == said
    (call,) = calls
    assert call["type"] == "function"
    assert call["function"]["name"] == "look_up"
    assert json.loads(call["function"]["arguments"]) == {"word": "é"}


def test_several_calls_are_found() -> None:
    hermes = f"<tool_call>{json.dumps(CALL)}</tool_call>" * 2
    for text in (hermes, f"{json.dumps(LLAMA)}; {json.dumps(LLAMA)}", json.dumps([CALL, CALL])):
        _, calls = find_calls(text, {"look_up"})
        assert len({call["id"] for call in calls}) == 2


@pytest.mark.parametrize(
    "text",
    [
        "No call.",
        "",
        '{"name": "other", "arguments": {}}',
        '{"name": "look_up", "arguments": 7}',
        '{"name": "look_up", "arguments": {}} and more',
        '{"answer": 5}',
        "[1, 2]",
        f"5 {json.dumps(CALL)}",
        "{" * 5000,
        json.dumps({"name": "look_up", "arguments": "[" * 5000}),
        '{"name": "look_up", "arguments": {"word": ' + "[" * 40 + "]" * 40 + "}}",
        r'{"name": "look_up", "arguments": {"word": "\ud800"}}',
    ],
)
def test_what_is_no_call_is_text(text: str) -> None:
    assert find_calls(text, {"look_up"}) == (text, [])


def test_a_template_without_tools_is_told_of_them() -> None:
    text = tell_tools([tool(type="object", properties={"word": {"type": "string"}})])
    assert "look_up" in text
    assert "Find a word." in text
