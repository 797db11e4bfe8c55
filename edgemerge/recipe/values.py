"""Checking the values of a recipe: paths, numbers, parameters, and tables of known keys.

What the keys of a recipe mean is in `edgemerge.recipe.mergekit`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NoReturn

from edgemerge.errors import RecipeError
from edgemerge.finding.finder import Finder
from edgemerge.formats.adapters.reference import AdapterUse, is_adapter, join_reference
from edgemerge.methods.table import known_parameters
from edgemerge.recipe.references import read_reference
from edgemerge.remote.stand_ins import is_address
from edgemerge.sizes import parse_size
from edgemerge.suggestions import find_closest, suggest, suggest_path
from edgemerge.types import Gradient, Parameters, Rule, Setting, Steps

__all__ = ["MAX_SEED", "MAX_STRAYS", "ValueReader", "brief", "check_alignment", "check_format"]
__all__ += ["is_utf8", "note_duplicates"]

MAX_SEED = (1 << 64) - 1  # the file keeps it as u64
MAX_STRAYS = 10  # of one table that are named one by one
FORMATS = ("gguf", "hf")
ALIGNMENTS = ("hard", "soft", "full", "off")
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.ASCII | re.IGNORECASE)


def check_alignment(value: str) -> str:
    """Refuse what is no way to align.

    Raises
    ------
    RecipeError
        It is none of hard, soft, full and off.
    """
    if value not in ALIGNMENTS:
        raise RecipeError(
            f"alignment is {brief(value)}; choose one of {', '.join(ALIGNMENTS)}", field="align"
        )
    return value


def check_format(value: str) -> str:
    """Refuse what is no format of an output.

    Raises
    ------
    RecipeError
        It is none of gguf and hf.
    """
    if value not in FORMATS:
        raise RecipeError(
            f"format is {brief(value)}; choose one of {', '.join(FORMATS)}", field="format"
        )
    return value


def note_duplicates(duplicates: Sequence[str], path: Path, *, strict: bool) -> tuple[str, ...]:
    """Note the keys of a file that stand twice; refuse them where all must count.

    Parameters
    ----------
    duplicates : sequence of str
        From `edgemerge.formats.yaml_file.read_documents`.
    path : Path
        The file.
    strict : bool
        Refuse them.
    """
    if duplicates and strict:
        raise RecipeError(f"{duplicates[0]}; remove one of the two", path=path)
    notes = [f"{found}, and the last one counts" for found in duplicates[:MAX_STRAYS]]
    if len(duplicates) > MAX_STRAYS:
        notes.append(f"{len(duplicates) - MAX_STRAYS} more keys stand twice")
    return tuple(notes)


class ValueReader:
    """Checks one value after the other.

    Parameters
    ----------
    path : Path or None
        The recipe's, for its errors and its models.
    strict : bool
        Refuse what is otherwise ignored with a note, as mergekit ignores it.
    stages : collection of str
        Names of merges that models may be taken from.
    finder : Finder, optional
        Finds models that are no paths; by default it fetches nothing.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        strict: bool = True,
        stages: Collection[str] = (),
        finder: Finder | None = None,
    ) -> None:
        self.path = path
        self.finder = finder or Finder()
        self.strict = strict
        self.stages = stages
        self.notes: list[str] = []
        self.base_path: Path | None = None  # which adapters alone are added to

    def fail(self, message: str, field: str | None = None) -> NoReturn:
        """Refuse the recipe."""
        raise RecipeError(message, path=self.path, field=field)

    # -- parameters -------------------------------------------------------------------------------

    def parameters(self, value: Any, where: str) -> Parameters:
        """Read a table of mergekit's parameters."""
        table = self.mapping(value if value is not None else {}, where)
        known = known_parameters()
        self.check_keys(table, tuple(known), where, what="parameter")
        dot = " " if where == "-P" else "."
        return {
            name: self.rules(entry, f"{where}{dot}{name}")
            for name, entry in table.items()
            if name in known
        }

    def rules(self, value: Any, where: str) -> tuple[Rule, ...]:
        """Read one parameter: a value, a gradient, or one or more filters with values."""
        if isinstance(value, dict):
            return (self.rule(value, where),)
        if isinstance(value, list) and not value:
            self.notes.append(f"{where} is an empty list, which says nothing")
            return ()
        if isinstance(value, list) and isinstance(value[0], dict):
            return tuple(self.rule(entry, where) for entry in value)
        return (Rule(self.setting(value, where)),)

    def rule(self, entry: Any, where: str) -> Rule:
        """Read one filter and its value."""
        entry = self.mapping(entry, where)
        self.check_keys(entry, ("filter", "value"), where)
        name = entry.get("filter")
        if "value" not in entry or not (name is None or isinstance(name, str)):
            self.fail(f"{where} needs entries of the form {{filter: TEXT, value: NUMBER}}", where)
        return Rule(self.setting(entry["value"], where), None if name == "*" else name)

    def setting(self, value: Any, where: str) -> Setting | Gradient | Steps:
        """Read a value, a gradient, or switches or words that follow each other over the layers."""
        if isinstance(value, list):
            if value and all(isinstance(x, bool) for x in value):
                return tuple(value)
            if value and all(isinstance(x, str) and self.number(x) is None for x in value):
                return tuple(value)
            numbers = [self.number(x) for x in value]
            if not numbers or None in numbers:
                self.fail(f"{where} must be a number, or a list of numbers (a gradient)", where)
            return tuple(x for x in numbers if x is not None)
        if isinstance(value, bool):
            return value
        if (number := self.number(value)) is not None:
            return number
        if isinstance(value, str):
            return value
        self.fail(
            f"{where} is {brief(value)}; it must be a finite number, true, false or text", where
        )

    def number(self, value: Any) -> float | None:
        """Return a finite number; YAML 1.1 takes 1e-3, without a point, for text."""
        if isinstance(value, str) and not NUMBER.fullmatch(value):
            return None
        if isinstance(value, bool) or not isinstance(value, Real | str):
            return None
        try:
            number = float(value)
        except OverflowError:
            return None
        return number if math.isfinite(number) else None

    # -- small checks -----------------------------------------------------------------------------

    def check_keys(
        self,
        table: Mapping[str, Any],
        known: Sequence[str],
        where: str,
        *,
        what: str = "key",
        places: Mapping[str, str] | None = None,
    ) -> None:
        """Note keys that are not known, which mergekit ignores; refuse them where all must count.

        Parameters
        ----------
        table : mapping
            What was written.
        known : sequence of str
            Keys that mean something there.
        where, what : str
            What the table and its keys are called.
        places : mapping of str to str, optional
            Keys that mean something elsewhere, and where.
        """
        strays = [key for key in table if key not in known]
        for key in strays[:MAX_STRAYS]:
            unknown = f"{where} has the unknown {what} {key!r}"
            if self.strict:
                self.fail(f"{unknown}; {suggest(key, known)}", key)
            hint = ""
            if place := (places or {}).get(key):
                hint = f"; it belongs under {place}"
            elif close := find_closest(key, known):
                hint = f"; did you mean {close!r}?"
            self.notes.append(f"{unknown}, which is ignored{hint}")
        if len(strays) > MAX_STRAYS:
            self.notes.append(f"{where} has {len(strays) - MAX_STRAYS} more unknown {what}s")

    def check_own_keys(self, table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
        """Refuse unknown keys of a table that only edgemerge reads."""
        for key in table:
            if key not in known:
                self.fail(f"{where} has the unknown key {key!r}; {suggest(key, known)}", key)

    def mapping(self, value: Any, where: str) -> Mapping[str, Any]:
        """Take a table."""
        if not isinstance(value, dict):
            is_model = (
                isinstance(value, str) and where.startswith("models[") and where.endswith("]")
            )
            hint = f"; write model: {value[:60]}" if is_model else ""
            self.fail(f"{where} must be a table of keys and values{hint}", where)
        return value

    def sequence(self, value: Any, where: str) -> Sequence[Any]:
        """Take a list that is not empty."""
        if not isinstance(value, list) or not value:
            self.fail(f"{where} must be a list that is not empty", where)
        return value

    def text(self, table: Mapping[str, Any], key: str, where: str | None = None) -> str:
        """Take a text that is not empty."""
        value = table.get(key)
        if not isinstance(value, str) or not value:
            self.fail(f"{where or key} is missing or is no text", key)
        return value

    def model_path(self, value: Any, where: str) -> Path:
        """Find a model as mergekit does: a stage of the recipe, else a file or folder."""
        if isinstance(value, str) and value and value not in self.stages:
            found = self.find(value, where)  # whole, as + and @ may be part of a name
            if found is None and is_address(value):  # @ and + have other meanings in it
                found = self.hub_path(value, None, where, "model")
            if found is not None:
                return self.with_base(found)
        reference = read_reference(value)
        if reference is None:
            self.fail(
                f"{where} must be the path of a model, as in PATH, PATH@REVISION or PATH+ADAPTER",
                where,
            )
        if reference.path in self.stages:
            if reference.adapters:
                self.fail(
                    f"{where}: an adapter is added to a model, and {brief(reference.path)} is a stage; "
                    "merge the stage by itself, and add the adapter to the result",
                    where,
                )
            return Path(reference.path)
        found = self.local_path(reference.path, reference.revision, where)
        if reference.has_architecture:
            self.notes.append(f"{where}: override_architecture is ignored")
        adapters = [
            AdapterUse(
                self.local_path(adapter.path, adapter.revision, where, what="LoRA adapter"),
                adapter.weight,
            )
            for adapter in reference.adapters
        ]
        return join_reference(found, adapters) if adapters else self.with_base(found)

    def with_base(self, found: Path) -> Path:
        """Take an adapter alone for the base with that adapter."""
        if self.base_path is None or not self.base_path.is_absolute() or not is_adapter(found):
            return found
        return join_reference(self.base_path, [AdapterUse(found)])

    def local_path(self, path: str, revision: str | None, where: str, what: str = "model") -> Path:
        """Find a model or an adapter, which must be here."""
        found = self.find(path, where)
        if found is None:
            found = self.hub_path(path, revision, where, what)
        elif revision is not None:
            self.notes.append(
                f"{where}: the revision {brief(revision)} does not apply to a local path; "
                f"{path} is taken as it is"
            )
        return found

    def hub_path(self, name: str, revision: str | None, where: str, what: str) -> Path:
        """Find a model or an adapter by its name on the hub, or by its address."""
        try:
            found = self.finder.find_on_hub(name, revision)
        except RecipeError as error:
            self.fail(f"{where}: {error}", where)
        if found is None:
            hint = suggest_path(name) or f"; download the {what} and give its path"
            if name.startswith("~"):  # which only a shell expands
                hint = f"; write the whole path, such as {os.path.expanduser(name)}"
            self.fail(f"{where}: no file or folder {name!r}{hint}", where)
        return found

    def file_path(self, value: Any, where: str) -> Path:
        """Find another file, where a model would be looked for."""
        if not isinstance(value, str) or not value:
            self.fail(f"{where} must be the path of a file", where)
        found = self.find(value, where)
        if found is None:
            hint = suggest_path(value) or "; check the path"
            self.fail(f"{where}: there is no file {value!r}{hint}", where)
        return found

    def find(self, name: str, where: str) -> Path | None:
        """Look in the working directory, then beside the recipe, then where the finder has models."""
        if not is_utf8(name):
            self.fail(f"{where}: the name {name!r} is not UTF-8; rename it", where)
        folders = [Path()] if self.path is None else [Path(), self.path.parent]
        found = self.finder.find_path(name, folders)
        return None if found is None else self._whole(found, where)

    def _whole(self, found: Path, where: str) -> Path:
        """Make a path absolute. A file keeps its name where that is a link, as in the hub's cache."""
        whole = found.parent.resolve() / found.name if found.is_file() else found.resolve()
        if not is_utf8(str(whole)):
            self.fail(f"{where}: the path {str(whole)!r} is not UTF-8; rename it", where)
        return whole

    def memory(self, value: Any) -> int:
        """Take a size in bytes."""
        try:
            return parse_size(value)
        except RecipeError as error:
            self.fail(f"edgemerge.memory: {error}", error.field)

    def seed(self, value: Any, where: str) -> int:
        """Take a whole number that the file can keep."""
        if type(value) is not int or not 0 <= value <= MAX_SEED:
            self.fail(f"{where} must be a whole number from 0 to 2^64 - 1", "seed")
        return value

    def switch(self, value: Any, where: str) -> bool:
        """Take true or false."""
        if not isinstance(value, bool):
            self.fail(f"{where} is {brief(value)}; it must be true or false", where)
        return value


def brief(value: object) -> str:
    """Show a value in a message, cut off where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def is_utf8(text: str) -> bool:
    """Tell whether a text can be written to a file; half a surrogate pair cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
