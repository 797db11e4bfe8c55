"""Recipes with values that are to be found: `{search: [low, high]}` in place of a number.

::

    lambda: {search: [0.2, 1.5]}                          one number
    lambda: [{search: [0.2, 1.5]}, {search: [0.2, 1.5]}]  two, for the first layer and the last
    epsilon: {search: [0.001, 0.1], log: true, start: 0.01}
    type: {search: [Q4_K_M, Q8_0]}                        one of some words
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from edgemerge.errors import RecipeError
from edgemerge.finding.finder import Finder
from edgemerge.recipe.mergekit import RecipeReader
from edgemerge.recipe.mixture import is_mixture
from edgemerge.recipe.values import brief, note_duplicates
from edgemerge.suggestions import suggest
from edgemerge.types import Recipe, Setting

__all__ = ["Choices", "Range", "SearchRecipe", "Space", "has_search", "load_search"]

KEYS = ("search", "start", "log")
UNSEARCHED = ("tokenizer",)  # a table by the texts of tokens, which may be `search`
DIGITS = 4  # significant ones of a value; what further ones change is less than a trial can tell
INSIDE = 0.381966  # a point of a range that no whole number hits by chance


@dataclass(frozen=True, slots=True)
class Range:
    """A number from `low` to `high`.

    Attributes
    ----------
    name : str
        Where it stands in the recipe, e.g. `lambda[0]`.
    low, high : float
        Both are allowed.
    is_log : bool
        Whether equal ratios count as equal steps.
    start : float
        What the search starts from.
    """

    name: str
    low: float
    high: float
    is_log: bool
    start: float

    def round(self, value: Setting) -> float:
        """Round a value to the digits that a recipe shows; it stays in the range."""
        return _round(value, self.low, self.high)


@dataclass(frozen=True, slots=True)
class Choices:
    """One of some words or switches; `start` is what the search starts from."""

    name: str
    options: tuple[bool | str, ...]
    start: bool | str


Space = Range | Choices


class SearchRecipe:
    """A recipe with values that are to be found.

    Parameters
    ----------
    path : Path
        The file, for errors and for models beside it.
    document : mapping
        What stands in it.
    strict, finder
        As `RecipeReader` takes them.
    notes : tuple of str
        What was found in the file; each of its recipes has them too.

    Attributes
    ----------
    path, document
        As given.
    spaces : tuple of Space
        What is to be found, in the order of the file. An alias (`*name`) of YAML is the same value again.

    Raises
    ------
    RecipeError
        A search is malformed, or there is none.
    """

    def __init__(
        self,
        path: Path,
        document: Mapping[str, Any],
        *,
        strict: bool = False,
        finder: Finder | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.path, self._strict, self._finder, self._notes = path, strict, finder, notes
        self.document = document
        self._spaces: dict[int, Space] = {}  # id of the table in the document -> what it says
        for name, table in _searches(document, ""):
            if id(table) not in self._spaces:
                self._add(name, table)
        self.spaces = tuple(self._spaces.values())
        if not self.spaces:
            self._fail("has nothing to search; put {search: [LOW, HIGH]} in place of a number")

    def start(self) -> dict[str, Setting]:
        """Return the values that the search starts from, by name."""
        return {space.name: space.start for space in self.spaces}

    def inside(self) -> dict[str, Setting]:
        """Return other values, which a recipe must allow too."""
        return {
            space.name: space.round(space.low + INSIDE * (space.high - space.low))
            if isinstance(space, Range)
            else space.options[-1]
            for space in self.spaces
        }

    def fill(self, values: Mapping[str, Setting]) -> dict[str, Any]:
        """Return the document with values, by the names of `spaces`, in place of the searches."""
        filled: dict[str, Any] = self._filled(self.document, values)
        return filled

    def recipe(self, values: Mapping[str, Setting], path: Path | None = None) -> Recipe:
        """Return the recipe with such values.

        Parameters
        ----------
        values : mapping of str to Setting
            By the names of `spaces`.
        path : Path, optional
            Where the recipe is to lie, if elsewhere: its models are looked for from there.

        Raises
        ------
        RecipeError
            It asks for something that does not exist.
        """
        reader = RecipeReader(path or self.path, strict=self._strict, finder=self._finder)
        recipe = reader.recipe(self.fill(values))
        return replace(recipe, out_format="gguf", notes=(*self._notes, *recipe.notes))

    def _add(self, name: str, table: Mapping[str, Any]) -> None:
        for key in table:
            if key not in KEYS:
                self._fail(f"{name} has the unknown key {key!r}; {suggest(key, KEYS)}", key)
        if name in (space.name for space in self._spaces.values()):
            self._fail(f"{name} is searched twice; only the first filter of a text counts", name)
        self._spaces[id(table)] = self._read(name, table)

    def _read(self, name: str, table: Mapping[str, Any]) -> Space:
        found = table["search"]
        options = found if isinstance(found, list) else []
        if len(options) == 2 and all(_is_number(one) for one in options):
            return self._range(name, float(options[0]), float(options[1]), table)
        if "log" in table or not _are_words(options):
            self._fail(
                f"the search of {name} is {brief(found)}; give [LOW, HIGH], two numbers, or a list of "
                "words or switches",
                name,
            )
        start = table.get("start", options[0])
        if start not in options:
            self._fail(f"the start of {name} is {brief(start)}, which is none of its words", name)
        return Choices(name, tuple(options), start)

    def _range(self, name: str, low: float, high: float, table: Mapping[str, Any]) -> Range:
        is_log = table.get("log", False)
        if not isinstance(is_log, bool):
            self._fail(f"log of {name} is {brief(is_log)}; it must be true or false", name)
        if not low < high:
            self._fail(f"the search of {name} goes from {low:g} to {high:g}; give LOW < HIGH", name)
        if f"{low:.{DIGITS}g}" == f"{high:.{DIGITS}g}":  # all values would be rounded to one
            self._fail(
                f"the search of {name} goes from {low!r} to {high!r}, one value to {DIGITS} digits; give "
                "bounds further apart",
                name,
            )
        if is_log and low <= 0:
            self._fail(f"log of {name} needs a range above 0, not from {low:g}", name)
        middle = math.sqrt(low) * math.sqrt(high) if is_log else (low + high) / 2
        start = table.get("start", _round(middle, low, high))
        if not _is_number(start) or not low <= start <= high:
            self._fail(
                f"the start of {name} is {brief(start)}; give a number from {low:g} to {high:g}",
                name,
            )
        return Range(name, low, high, is_log, float(start))

    def _filled(self, value: Any, values: Mapping[str, Setting]) -> Any:
        if (space := self._spaces.get(id(value))) is not None:
            found = values[space.name]
            return space.round(found) if isinstance(space, Range) else found
        if isinstance(value, dict):
            return {key: self._filled(one, values) for key, one in value.items()}
        if isinstance(value, list):
            return [self._filled(one, values) for one in value]
        return value

    def _fail(self, message: str, field: str | None = None) -> NoReturn:
        raise RecipeError(message, path=self.path, field=field)


def load_search(path: Path, *, strict: bool = False, finder: Finder | None = None) -> SearchRecipe:
    """Read a recipe with searches from a YAML file, and see that it can be merged.

    Parameters
    ----------
    path : Path
        The file.
    strict, finder
        As of `edgemerge.recipe.recipe.load_recipe`.

    Raises
    ------
    RecipeError
        The file cannot be read, has no search, or asks for something that does not exist.
    """
    from edgemerge.formats.yaml_file import read_documents

    documents, duplicates = read_documents(path)
    if len(documents) != 1 or not isinstance(documents[0], dict) or is_mixture(documents[0]):
        raise RecipeError(
            "is not a recipe of one merge, whose settings could be searched; give one with "
            "merge_method, and search stages one by one",
            path=path,
        )
    notes = note_duplicates(duplicates, path, strict=strict)
    found = SearchRecipe(path, documents[0], strict=strict, finder=finder, notes=notes)
    for values in (found.inside(), found.start()):
        found.recipe(values)
    return found


def has_search(document: Any) -> bool:
    """Tell whether a document, or a value in it, has a value that is to be found."""
    return next(_searches(document, ""), None) is not None


def _searches(value: Any, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the tables with `search` and where they stand, in the document's order."""
    if isinstance(value, dict):
        if name and "search" in value:
            yield name, value
            return
        for key, one in value.items():
            if name or key not in UNSEARCHED:
                yield from _searches(one, _join(name, str(key)))
    elif isinstance(value, list):
        for i, one in enumerate(value):
            yield from _searches(
                one, f"{name}({_filter(one)})" if _is_rule(one) else f"{name}[{i}]"
            )


def _join(name: str, key: str) -> str:
    """Name a key: `models[0].weight`, without the words that say nothing."""
    if key in ("parameters", "value"):
        return name
    return f"{name}.{key}" if name else key


def _is_rule(entry: Any) -> bool:
    return isinstance(entry, dict) and "value" in entry


def _filter(rule: Mapping[str, Any]) -> str:
    name = rule.get("filter")
    return "rest" if name in (None, "*") else str(name)


def _is_number(value: Any) -> bool:
    """Tell whether this is a finite number; a whole one may have more digits than a float can."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max


def _are_words(options: Sequence[Any]) -> bool:
    """Tell whether these are two or more words, or the two switches, none of them twice."""
    kinds = {type(one) for one in options}
    return len(options) > 1 and len(kinds) == 1 and kinds <= {str, bool} and _differ(options)


def _differ(options: Sequence[Any]) -> bool:
    return len(set(options)) == len(options)


def _round(value: Setting, low: float, high: float) -> float:
    return min(max(float(f"{float(value):.{DIGITS}g}"), low), high)
