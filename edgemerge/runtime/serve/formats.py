"""JSON that an answer has to be: schemas into grammars, and only those that end.

llama.cpp computes with grammars where nothing stops it, and some of a few hundred letters never end. So
schemas are bounded before they become one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from edgemerge.runtime.library import load_library
from edgemerge.runtime.serve.errors import Refusal

__all__ = ["ResponseFormat", "format_grammar", "inline_references", "schema_grammar"]

_LITERALS = {"const", "enum", "default", "examples"}  # keywords that hold values, not schemas
_WORDS = {"pattern", "patternProperties"}  # regular expressions
_ITEMS = 500  # values in a schema
_COUNT = 200  # largest number in one, such as maxItems


class _Schema(BaseModel):
    name: str = ""
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")


class _Text(BaseModel):
    type: Literal["text"]


class _Object(BaseModel):
    type: Literal["json_object"]
    schema_: dict[str, Any] | None = Field(None, alias="schema")  # llama-cpp-python's addition


class _BySchema(BaseModel):
    type: Literal["json_schema"]
    json_schema: _Schema


ResponseFormat = Annotated[_Text | _Object | _BySchema, Field(discriminator="type")]


def format_grammar(wanted: _Text | _Object | _BySchema | None) -> str:
    """GBNF of a `response_format`; empty where any text will do.

    Raises
    ------
    Refusal
        400: its schema is too large, or has what may not end.
    """
    if isinstance(wanted, _Object) and wanted.schema_ is None:
        load_library()  # before llama_cpp itself, whose log it takes over
        from llama_cpp.llama_grammar import JSON_GBNF

        return str(JSON_GBNF)
    if isinstance(wanted, _Object):
        return schema_grammar(wanted.schema_ or {})
    if isinstance(wanted, _BySchema):
        return schema_grammar(wanted.json_schema.schema_)
    return ""


def schema_grammar(schema: dict[str, Any]) -> str:
    """GBNF of a JSON schema.

    Raises
    ------
    Refusal
        As of `format_grammar`.
    """
    load_library()
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    (plain,) = inline_references([schema])
    for name, value in _walk(plain):
        if name in _WORDS:
            raise Refusal(400, f"{name}: not possible in a JSON schema here")
        if isinstance(value, int | float) and abs(value) > _COUNT:
            raise Refusal(400, f"{name}: at most {_COUNT} in a JSON schema here")
    try:
        return str(json_schema_to_gbnf(json.dumps(plain)))
    except Exception as error:  # it takes a sound schema for granted
        raise Refusal(400, f"the JSON schema cannot be used ({type(error).__name__})") from None


def inline_references(schemas: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put what `$ref` names in its place, in each schema from its own root.

    Raises
    ------
    Refusal
        400: there is no such place, or all together are too large, or nested too deep.
    """
    n_left = _ITEMS
    found = []
    for schema in schemas:
        inliner = _Inliner(schema, n_left)
        try:
            found.append(inliner.inline(schema))
        except RecursionError:
            raise Refusal(400, "the JSON schema is nested too deep") from None
        n_left = inliner.n_left
    return found


class _Inliner:
    """Inlines one schema, and counts its values, so that the size of all of it is known."""

    def __init__(self, root: dict[str, Any], n_left: int) -> None:
        self._root = root
        self.n_left = n_left

    def inline(self, value: Any, open_: tuple[str, ...] = ()) -> Any:
        self._count()
        if isinstance(value, list):
            return [self.inline(item, open_) for item in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            name = value["$ref"]
            if name in open_:
                raise Refusal(400, f"$ref: {name} contains itself, which may not end")
            return self.inline(self._find(name), (*open_, name))
        return {
            key: self._inline_keyword(key, item, open_)
            for key, item in value.items()
            if key not in ("$defs", "definitions")
        }

    def _inline_keyword(self, key: str, value: Any, open_: tuple[str, ...]) -> Any:
        if key in _LITERALS:
            self._count_all(value)
            return value
        if key != "properties" or not isinstance(value, dict):
            return self.inline(value, open_)
        self._count()
        return {name: self.inline(schema, open_) for name, schema in value.items()}

    def _count_all(self, value: Any) -> None:
        self._count()
        if isinstance(value, dict) and "$ref" in value:  # llama-cpp-python would look for it
            raise Refusal(400, "$ref: not possible in a value of a JSON schema here")
        for item in value.values() if isinstance(value, dict) else ():
            self._count_all(item)
        for item in value if isinstance(value, list) else ():
            self._count_all(item)

    def _count(self) -> None:
        self.n_left -= 1
        if self.n_left < 0:
            raise Refusal(400, f"the JSON schemas have more than {_ITEMS} values")

    def _find(self, name: Any) -> Any:
        found: Any = self._root
        if not isinstance(name, str) or not name.startswith("#/"):
            raise Refusal(400, "$ref: only to a place in the same JSON schema")
        for part in name[2:].split("/"):
            if not isinstance(found, dict) or part not in found:
                raise Refusal(400, f"$ref: there is no {name}")
            found = found[part]
        return found


def _walk(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all that keywords say inside a schema, each with its keyword."""
    yield name, value
    if name == "properties" and isinstance(value, dict):
        for schema in value.values():
            yield from _walk(schema)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in _LITERALS:
                yield from _walk(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from _walk(item, name)
