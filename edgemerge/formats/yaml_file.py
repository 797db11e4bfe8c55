"""Reading the YAML documents of a file that a stranger may have written: small and plain.

Duplicate keys and aliases are read as PyYAML reads them, which mergekit uses. Duplicates are told.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from edgemerge.errors import RecipeError
from edgemerge.remote.any_address import refuse_recipe
from edgemerge.remote.stand_ins import is_address
from edgemerge.suggestions import suggest_path

__all__ = ["MAX_RECIPE_BYTES", "read_documents", "read_value"]

MAX_RECIPE_BYTES = 1 << 18  # what PyYAML reads in 3 s and 100 MB at worst; real recipes have 2 KB
MAX_NODES = 100_000  # with every alias in full; real recipes have some hundreds
MAX_DEPTH = 64  # PyYAML's time grows with the square of the depth; real recipes are 10 deep
MAX_BITS = (
    1 << 12
)  # of a whole number, which may be written in hex; Python shows 4300 digits and no more
MERGE_TAG, TEXT_TAG = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:str"


def read_documents(path: Path) -> tuple[list[Any], list[str]]:
    """Read the documents of a recipe.

    Returns
    -------
    documents : list
        Plain types; empty documents are left out.
    duplicates : list of str
        `line 6: the key 'base_model' stands twice`, for each key of which only the last entry counts.

    Raises
    ------
    RecipeError
        The file cannot be read, is too large, or is no YAML with text as keys.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_RECIPE_BYTES + 1)
    except OSError as error:
        if is_address(str(path)):
            raise RecipeError(refuse_recipe(str(path))) from None
        reason = error.strerror or str(error)
        hint = suggest_path(path) or "; check its path"
        raise RecipeError(f"cannot read the recipe ({reason}){hint}", path=path) from None
    if len(raw) > MAX_RECIPE_BYTES:
        raise RecipeError("is larger than 256 KiB, so it is no recipe", path=path)
    try:
        loader = _BoundedLoader(raw)
        documents = []
        while loader.check_data():  # type: ignore[no-untyped-call]
            documents.append(loader.get_data())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"is not valid YAML ({_yaml_problem(error)})", path=path) from None
    return [document for document in documents if document is not None], loader.duplicates


def read_value(text: str) -> Any:
    """Read one value, as a command line has it.

    Raises
    ------
    RecipeError
        It is no YAML.
    """
    try:
        return _BoundedLoader(text).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"is not valid YAML ({_yaml_problem(error)})") from None


class _BoundedLoader(yaml.SafeLoader):
    """SafeLoader that lists duplicate keys, and refuses what aliases would make large or endless."""

    def __init__(self, raw: bytes | str) -> None:
        super().__init__(raw)
        self.duplicates: list[str] = []
        self._n_nodes: dict[int, int] = {}  # id of a finished node -> nodes in it, aliases in full
        self._depth = 0

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        # The scanner reads up to 1024 characters before the nodes that compose_node counts.
        if self.flow_level >= MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def compose_document(self) -> Any:
        self._n_nodes.clear()
        return super().compose_document()

    def compose_node(self, parent: Any, index: Any) -> Any:
        is_alias = self.check_event(yaml.AliasEvent)
        event = self.peek_event()  # type: ignore[no-untyped-call]
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _at("nested too deeply", event)
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias:
            if id(node) not in self._n_nodes:
                raise _at("an alias stands inside what it repeats", event)
            return node
        children = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            self._check_keys(node)
            children = [child for pair in node.value for child in pair]
        n_nodes = 1 + sum(self._n_nodes[id(child)] for child in children)
        if n_nodes > MAX_NODES:
            raise _at("aliases make it too large for a recipe", event)
        self._n_nodes[id(node)] = n_nodes
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        # PyYAML raises these for a value that its tag does not allow.
        try:
            value = super().construct_object(node, deep)
        except (AttributeError, LookupError):
            raise _at(f"this is no {node.tag.rpartition(':')[2]}", node) from None
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise _at("this number has more digits than any setting", node)
        return value

    def _check_keys(self, node: yaml.MappingNode) -> None:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == MERGE_TAG:
                continue
            if not isinstance(key, yaml.ScalarNode) or key.tag != TEXT_TAG:
                shown = f"the key {key.value}" if isinstance(key, yaml.ScalarNode) else "a key"
                raise _at(f"{shown} is not text", key)
            if key.value in seen:
                line = key.start_mark.line + 1
                self.duplicates.append(f"line {line}: the key {key.value!r} stands twice")
            seen.add(key.value)


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
