"""Calls of tools in what models write: Hermes and Qwen, Llama 3, Mistral, and plain JSON."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection, Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from edgemerge.runtime.serve.errors import Refusal
from edgemerge.runtime.serve.formats import inline_references, schema_grammar
from edgemerge.runtime.serve.requests import check_json, read_json

__all__ = ["Tool", "ToolChoice", "find_calls", "may_be_call", "tell_tools", "tool_grammar"]

_OPEN = "<tool_call>"  # may follow text; all other forms begin the answer
# What may stand before a call; control tokens among them are not part of an answer's text.
_MARKS = ("<|python_tag|>", "[TOOL_CALLS]", "```json")
_OBJECTS = re.compile(
    r'[\[\s]*(?:\{\s*(?:["}]|\Z)|\Z)'
)  # an object, or a list of them, or the beginning
_HERMES = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)
_MARK = re.compile(r"^\s*(?:<\|python_tag\|>|\[TOOL_CALLS\]|```(?:json)?)\s*")
_NAMED = re.compile(r"^([\w.-]{1,64})\s*(?:\[ARGS\])?\s*(?=\{)")  # Mistral's later form: name{...}
_DECODER = json.JSONDecoder()


class _Function(BaseModel):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    """A function that the model may call."""

    type: Literal["function"]
    function: _Function


class _Name(BaseModel):
    name: str


class _Named(BaseModel):
    type: Literal["function"]
    function: _Name


ToolChoice = Literal["none", "auto", "required"] | _Named


def tell_tools(tools: Sequence[Tool]) -> str:
    """Say to a model whose chat template knows nothing of tools what they are, and how to call one."""
    lines = "\n".join(json.dumps(tool.function.model_dump(exclude_none=True)) for tool in tools)
    return (
        f"You can call these functions:\n{lines}\n\nTo call one, answer with nothing but "
        '{"name": NAME, "arguments": {...}} as JSON.'
    )


def tool_grammar(tools: Sequence[Tool], choice: ToolChoice, template: str) -> str:
    """GBNF of a call that the model has to make; empty where it may do without.

    Parameters
    ----------
    tools : sequence of Tool
        What there is.
    choice : ToolChoice
        The request's.
    template : str
        The model's chat template: one that writes `<tool_call>` gets its calls in these.

    Raises
    ------
    Refusal
        400: no tool has the name that is asked for, or its schema cannot be used.
    """
    if isinstance(choice, str) and choice != "required":
        return ""
    called = [
        tool
        for tool in tools
        if isinstance(choice, str) or tool.function.name == choice.function.name
    ]
    if not called:
        raise Refusal(400, "tool_choice: there is no such tool")
    key = "parameters" if "python_tag" in template else "arguments"
    schemas = inline_references([tool.function.parameters or {"type": "object"} for tool in called])
    forms = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                key: schema,
            },
            "required": ["name", key],
        }
        for tool, schema in zip(called, schemas, strict=True)
    ]
    grammar = schema_grammar({"anyOf": forms})
    if "<tool_call>" not in template:
        return grammar
    body = re.sub(r"^root ::=", "call ::=", grammar, flags=re.MULTILINE)
    return f'root ::= "<tool_call>\\n" call "\\n</tool_call>"\n{body}'


def may_be_call(text: str, names: Collection[str], *, is_begun: bool) -> bool:
    """Whether what a model has written is, or may become, a call.

    Parameters
    ----------
    text : str
        What nobody was told yet.
    names : collection of str
        Of the tools.
    is_begun : bool
        Whether text of the same answer was told before.
    """
    if _OPEN in text or any(text.endswith(_OPEN[:n]) for n in range(1, len(_OPEN))):
        return True
    return not is_begun and _may_be_plain(text, names)


def find_calls(
    text: str, names: Collection[str], *, is_begun: bool = False
) -> tuple[str, list[dict[str, Any]]]:
    """Split an answer into text and calls, as OpenAI writes them.

    Parameters
    ----------
    text : str
        What the model wrote.
    names : collection of str
        Of the tools; what calls no such one is text.
    is_begun : bool
        Whether it is the end of an answer, whose beginning `may_be_call` has called text.
    """
    said, calls = text, list(_hermes(text, names))
    if calls:
        said = text.partition(_OPEN)[0].rstrip()
        said = said if is_begun else said.lstrip()
    elif not is_begun and _may_be_plain(text, names):
        calls = list(_plain(text, names))
        said = "" if calls else text
    return said, [
        {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
        }
        for name, arguments in calls
    ]


def _hermes(text: str, names: Collection[str]) -> Iterator[tuple[str, Any]]:
    for match in _HERMES.finditer(text):
        for value in _values(match[1]):
            yield from _calls_in(value, names)


def _may_be_plain(text: str, names: Collection[str]) -> bool:
    """Whether an answer that begins so may be nothing but calls."""
    if any(mark.startswith(text.lstrip()) for mark in _MARKS):
        return True
    rest = _MARK.sub("", text).lstrip()
    return bool(_OBJECTS.match(rest)) or any(_may_be_named(rest, name) for name in names)


def _may_be_named(text: str, name: str) -> bool:
    """Whether a text is, or may become, what `_NAMED` finds."""
    if not text.startswith(name):
        return name.startswith(text)
    rest = text.removeprefix(name).lstrip()
    return "[ARGS]".startswith(rest) or rest.removeprefix("[ARGS]").lstrip()[:1] in ("", "{")


def _plain(text: str, names: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Find calls in an answer that is nothing but calls."""
    rest = _MARK.sub("", text).lstrip()
    rest = re.sub(r"\s*```\s*$", "", rest)
    if (named := _NAMED.match(rest)) and named[1] in names:
        for value in _values(rest[named.end() :]):
            yield named[1], value
        return
    for value in _values(rest):
        yield from _calls_in(value, names)


def _values(text: str) -> Iterator[Any]:
    """Read JSON values one after the other, or nothing; Llama 3 puts semicolons between them."""
    values, at = [], 0
    try:
        while at < len(text):
            value, at = _DECODER.raw_decode(text, at)
            check_json(value)
            values.append(value)
            at += len(text[at:]) - len(text[at:].lstrip("; \n\t\r"))
    except (ValueError, RecursionError):
        return
    yield from values


def _calls_in(value: Any, names: Collection[str]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list):
        for item in value:
            yield from _calls_in(item, names)
        return
    if not isinstance(value, dict):
        return
    if isinstance(value.get("tool_calls"), list):
        yield from _calls_in(value["tool_calls"], names)
        return
    if isinstance(value.get("function"), dict):
        value = value["function"]
    name = value.get("name", value.get("function"))
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = read_json(arguments)
        except ValueError:
            return
    if isinstance(name, str) and name in names and isinstance(arguments, dict):
        yield name, arguments
