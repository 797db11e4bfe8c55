"""Reading one YAML document that a stranger may have written: small, plain, without surprises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from edgemerge.errors import RecipeError

__all__ = ["MAX_RECIPE_BYTES", "read_yaml"]

MAX_RECIPE_BYTES = 1 << 18  # what PyYAML reads in 3 s and 100 MB at worst; real recipes have 2 KB


def read_yaml(path: Path) -> Any:
    """Read a recipe's document.

    Raises
    ------
    RecipeError
        The file cannot be read, is too large, or is no YAML of one document with text as keys.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_RECIPE_BYTES + 1)
    except OSError as error:
        reason = error.strerror or str(error)
        raise RecipeError(f"cannot read the recipe ({reason}); check its path", path=path) from None
    if len(raw) > MAX_RECIPE_BYTES:
        raise RecipeError("is larger than 256 KiB, so it is no recipe", path=path)
    try:
        return yaml.load(raw, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"is not valid YAML ({_yaml_problem(error)})", path=path) from None


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and aliases, which YAML bombs are made of."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise _at("aliases are not allowed in a recipe", self.current_event)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _at(f"the key {key!r} is not text", key_node)
            if key in seen:
                raise _at(f"the key {key!r} stands twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _at(problem: str, where: Any) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=where.start_mark)


def _yaml_problem(error: Exception) -> str:
    """Say what is wrong with a document, and in which line."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())[:200]
    problem = " ".join(str(getattr(error, "problem", None)).split())[:200]
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"
