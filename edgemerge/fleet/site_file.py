"""SITE.yml: what a device shall be made of, by which rule a model is promoted, and where it serves.

Everything in it is checked when it is read. A key that is not known is refused, with the nearest that is.
Paths are taken from the folder of the file.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from edgemerge.errors import RecipeError
from edgemerge.formats.yaml_file import read_documents
from edgemerge.methods.table import METHODS
from edgemerge.recipe.values import ValueReader, brief
from edgemerge.remote.stand_ins import is_address
from edgemerge.sizes import parse_size
from edgemerge.suggestions import suggest, suggest_path

__all__ = ["Merge", "RegistryPlace", "Rule", "ServerPlace", "Site", "Wanted", "read_site"]

NEWEST = "newest"
DEVICE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)
MARGIN = 2.0  # points, or percent of perplexity
MAX_KEEP = 1000
MAX_WATCH = 3600  # seconds
KEYS: tuple[str, ...] = ("device", "folder", "registry", "base", "experts", "merge", "questions")
KEYS += ("texts", "promote", "serve", "keep", "reports", "threads")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A model, delta or adapter that the site names.

    Attributes
    ----------
    path : Path or None
        A file or folder of this machine.
    name : str
        Of the registry's entry, where there is no path.
    version : str or None
        Of the entry; None for the newest.
    weight : float or None
        Of an expert.
    """

    path: Path | None = None
    name: str = ""
    version: str | None = None
    weight: float | None = None

    @property
    def title(self) -> str:
        """What people call it."""
        return self.path.name if self.path is not None else self.name


@dataclass(frozen=True, slots=True)
class RegistryPlace:
    """Where the registry is, and the file with which its roles are trusted."""

    address: str
    trust: Path


@dataclass(frozen=True, slots=True)
class Merge:
    """How the experts are merged; the names are those of `edgemerge.recipe.recipe.make_recipe`."""

    method: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    out_type: str | None = None
    memory: int | None = None
    seed: int = 0
    align: str | None = None
    imatrix: Path | None = None
    recipe: Path | None = None  # in place of method, base and experts


@dataclass(frozen=True, slots=True)
class Rule:
    """When a model is promoted.

    Attributes
    ----------
    margin : float
        What a task may lose in percentage points, and a text in percent of perplexity.
    margins : mapping of str to float
        The same for single tasks and texts.
    confidence : float
        Of the intervals that must exclude such a loss, and of McNemar's test.
    better : tuple of str or None
        Tasks that must be better; None: any one of them.
    slowdown : float
        By how much the new model may write more slowly, as a factor.
    ask, expect : str or None
        A question that it must answer, and what must stand in the answer.
    watch : float
        Seconds in which it is watched when it serves.
    """

    margin: float = MARGIN
    margins: Mapping[str, float] = field(default_factory=dict)
    confidence: float = 0.95
    better: tuple[str, ...] | None = None
    slowdown: float = 1.5
    ask: str | None = None
    expect: str | None = None
    watch: float = 30.0

    def margin_of(self, name: str) -> float:
        """Return what a task or text may lose."""
        return self.margins.get(name, self.margin)


@dataclass(frozen=True, slots=True)
class ServerPlace:
    """Where `edgemerge serve` is, the file with its key, and its name for the model."""

    address: str
    key: Path | None = None
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Site:
    """A checked SITE.yml; every path is absolute."""

    path: Path
    device: str
    folder: Path
    registry: RegistryPlace | None
    base: Wanted | None
    experts: tuple[Wanted, ...]
    merge: Merge
    questions: Mapping[str, Path]
    texts: Mapping[str, Path]
    rule: Rule
    serve: ServerPlace | None
    keep: int
    reports: Path | None
    threads: int | None
    home: Path | None  # what `~` stands for; None where no path begins with it


def read_site(path: Path) -> Site:
    """Read a SITE.yml.

    Raises
    ------
    RecipeError
        It cannot be read, or asks for what does not exist or is not possible.
    """
    path = path.absolute()
    documents, duplicates = read_documents(path)
    if len(documents) != 1 or not isinstance(documents[0], dict):
        raise RecipeError("must be one table with keys such as base and experts", path=path)
    if duplicates:
        raise RecipeError(f"{duplicates[0]}; remove one of the two", path=path)
    return _SiteReader(path).site(documents[0])


class _SiteReader:
    """Checks one value after the other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values = ValueReader(path, strict=True)
        self.home: Path | None = None

    def site(self, table: Mapping[str, Any]) -> Site:
        self.keys(table, KEYS, "the file")
        registry = self.registry(table.get("registry"))
        merge = self.merge(table.get("merge", {}))
        base, experts = self.inputs(table, merge, has_registry=registry is not None)
        questions = self.files(table.get("questions"), "questions")
        texts = self.files(table.get("texts"), "texts")
        if not questions:
            self.fail("names no questions, so nothing can tell which model is better", "questions")
        if twice := sorted(questions.keys() & texts.keys()):
            self.fail(f"has {twice[0]!r} as questions and as a text; rename one", "texts")
        folder = table.get("folder")
        return Site(
            path=self.path,
            device=self.device(table.get("device")),
            folder=self.path.parent if folder is None else self.place(folder, "folder"),
            registry=registry,
            base=base,
            experts=experts,
            merge=merge,
            questions=questions,
            texts=texts,
            rule=self.rule(table.get("promote", {}), questions, texts),
            serve=self.server(table.get("serve")),
            keep=int(self.number(table.get("keep", 3), "keep", 1, MAX_KEEP, whole=True)),
            reports=None if "reports" not in table else self.place(table["reports"], "reports"),
            threads=None
            if "threads" not in table
            else int(self.number(table["threads"], "threads", 1, 1024, whole=True)),
            home=self.home,  # the last one: all paths are read
        )

    # -- parts -------------------------------------------------------------------------------------

    def device(self, value: Any) -> str:
        name = socket.gethostname() if value is None else value
        if not isinstance(name, str) or not DEVICE.fullmatch(name):
            self.fail(
                f"device is {brief(name)}; give a name of letters, digits, dots and hyphens, as of a file",
                "device",
            )
        return name

    def registry(self, value: Any) -> RegistryPlace | None:
        if value is None:
            return None
        table = self.table(value, ("address", "trust"), "registry")
        address = self.values.text(table, "address", "registry.address")
        if not is_address(address):
            address = str(self.place(address, "registry.address"))
        return RegistryPlace(address, self.file(table.get("trust"), "registry.trust"))

    def inputs(
        self, table: Mapping[str, Any], merge: Merge, *, has_registry: bool
    ) -> tuple[Wanted | None, tuple[Wanted, ...]]:
        if merge.recipe is not None:
            if "experts" in table:
                self.fail("has experts, which merge.recipe names itself; remove one", "experts")
            if "base" not in table:
                return None, ()
            base = self.wanted(table["base"], "base", has_registry=has_registry)
            if base.path is None:  # whose index is not read for a recipe
                self.fail("has a recipe, so base must be {path: FILE.gguf}", "base")
            return base, ()
        if "base" not in table:
            self.fail(
                "names no base; give {path: FILE.gguf}, or {name: NAME} of the registry", "base"
            )
        base = self.wanted(table["base"], "base", has_registry=has_registry)
        experts = [
            self.wanted(one, f"experts[{i}]", has_registry=has_registry)
            for i, one in enumerate(self.values.sequence(table.get("experts"), "experts"))
        ]
        return base, tuple(experts)

    def wanted(self, value: Any, where: str, *, has_registry: bool) -> Wanted:
        if isinstance(value, str):
            said = brief(value)
            self.fail(f"{where} is {said}; write {{path: {value[:80]}}}, or {{name: NAME}}", where)
        known = ("path", "name", "version", "weight")
        table = self.table(value, known if where != "base" else known[:3], where)
        weight = table.get("weight")
        if weight is not None and (weight := self.values.number(weight)) is None:
            self.fail(f"{where}.weight is {brief(table['weight'])}; give a number", where)
        if "path" in table:
            if extra := [key for key in ("name", "version") if key in table]:
                self.fail(f"{where} has a path and a {extra[0]}; a path needs none", where)
            return Wanted(self.existing(table["path"], f"{where}.path"), weight=weight)
        name = self.values.text(table, "name", f"{where}.name")
        if not has_registry:
            self.fail(
                f"{where} is {name!r} of a registry, and the file names none; add registry with address and "
                "trust, or give a path",
                where,
            )
        return Wanted(None, name, self.version(table.get("version", NEWEST), where), weight)

    def version(self, value: Any, where: str) -> str | None:
        if isinstance(value, float):  # 1.10 would be 1.1
            self.fail(f'{where}.version is a number with a point; write it as "{value}"', where)
        if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
            self.fail(f'{where}.version is {brief(value)}; give newest, or as "1.2"', where)
        return None if value == NEWEST else str(value)

    def merge(self, value: Any) -> Merge:
        known = ("method", "parameters", "type", "memory", "seed", "align", "imatrix", "recipe")
        table = self.table(value, known, "merge")
        memory = table.get("memory")
        try:
            n_bytes = None if memory is None else parse_size(memory)
        except RecipeError as error:
            self.fail(f"merge.memory: {error}", "merge")
        if "recipe" in table:
            if extra := [key for key in table if key not in ("recipe", "memory")]:
                self.fail(f"merge has a recipe and {extra[0]}, which goes into the recipe", "merge")
            return Merge(memory=n_bytes, recipe=self.file(table["recipe"], "merge.recipe"))
        method = self.values.text(table, "method", "merge.method")
        if method not in METHODS:
            self.fail(f"merge.method is {method!r}; {suggest(method, METHODS)}", "merge")
        parameters = self.values.mapping(table.get("parameters", {}), "merge.parameters")
        self.values.parameters(parameters, "merge.parameters")
        imatrix = table.get("imatrix")
        align = "off" if table.get("align") is False else table.get("align")  # YAML's word for off
        return Merge(
            method,
            parameters,
            None if "type" not in table else self.values.text(table, "type", "merge.type"),
            n_bytes,
            self.values.seed(table.get("seed", 0), "merge.seed"),
            None if align is None else self.values.text({"align": align}, "align", "merge.align"),
            None if imatrix is None else self.file(imatrix, "merge.imatrix"),
        )

    def rule(self, value: Any, questions: Mapping[str, Path], texts: Mapping[str, Path]) -> Rule:
        known = ("margin", "confidence", "better", "slowdown", "smoke", "watch")
        table = self.table(value, known, "promote")
        margins = table.get("margin", MARGIN)
        named = margins if isinstance(margins, dict) else {}
        self.keys(named, (*questions, *texts), "promote.margin")
        smoke = self.table(table.get("smoke", {}), ("ask", "expect"), "promote.smoke")
        better = table.get("better")
        if better is not None and not isinstance(better, list):
            self.fail("promote.better must be a list of names of questions", "better")
        for name in better or ():
            if name not in questions:
                self.fail(f"promote.better has {name!r}; {suggest(str(name), questions)}", "better")
        if "expect" in smoke and "ask" not in smoke:
            self.fail("promote.smoke expects an answer and asks nothing; give ask too", "smoke")
        return Rule(
            MARGIN if named else self.number(margins, "promote.margin", 0, 100),
            {k: self.number(v, f"promote.margin.{k}", 0, 100) for k, v in named.items()},
            self.number(table.get("confidence", 0.95), "promote.confidence", 0.5, 0.9999),
            None if better is None else tuple(better),
            self.number(table.get("slowdown", 1.5), "promote.slowdown", 1, 100),
            self.values.text(smoke, "ask", "promote.smoke.ask") if smoke else None,
            self.values.text(smoke, "expect", "promote.smoke.expect")
            if "expect" in smoke
            else None,
            self.number(table.get("watch", 30), "promote.watch", 0, MAX_WATCH),
        )

    def server(self, value: Any) -> ServerPlace | None:
        if value is None:
            return None
        table = self.table(value, ("address", "key", "model"), "serve")
        address = self.values.text(table, "address", "serve.address").rstrip("/")
        try:
            parts = urlsplit(address)
            is_sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # of a bracket, or of a port
            is_sound = False
        if not is_sound or parts.path:
            self.fail(f"serve.address is {address!r}; give it as http://127.0.0.1:8080", "serve")
        model = None if "model" not in table else self.values.text(table, "model", "serve.model")
        key = None if "key" not in table else self.file(table["key"], "serve.key")
        return ServerPlace(address, key, model)

    # -- small checks ------------------------------------------------------------------------------

    def fail(self, message: str, field: str) -> NoReturn:
        raise RecipeError(message, path=self.path, field=field)

    def keys(self, table: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
        self.values.check_own_keys(table, known, where)

    def table(self, value: Any, known: tuple[str, ...], where: str) -> Mapping[str, Any]:
        table = self.values.mapping(value, where)
        self.keys(table, known, where)
        return table

    def number(
        self, value: Any, where: str, low: float, high: float, *, whole: bool = False
    ) -> float:
        number = self.values.number(value)
        if number is None or not low <= number <= high or (whole and type(value) is not int):
            kind = "a whole number" if whole else "a number"
            self.fail(f"{where} is {brief(value)}; give {kind} from {low:g} to {high:g}", where)
        return number

    def files(self, value: Any, where: str) -> Mapping[str, Path]:
        table = self.values.mapping({} if value is None else value, where)
        return {name: self.file(one, f"{where}.{name}") for name, one in table.items()}

    def place(self, value: Any, where: str) -> Path:
        if not isinstance(value, str) or not value or "\0" in value:
            said = "missing" if value is None else brief(value)
            self.fail(f"{where} is {said}; give a path", where)
        if value.partition("/")[0] == "~":
            self.home = Path(os.path.expanduser("~"))
        return self.path.parent / os.path.expanduser(value)

    def existing(self, value: Any, where: str) -> Path:
        path = self.place(value, where)
        if not path.exists():
            hint = suggest_path(path) or "; check the path"
            self.fail(f"{where}: there is no {str(path)!r}{hint}", where)
        return path

    def file(self, value: Any, where: str) -> Path:
        path = self.existing(value, where)
        if not path.is_file():
            self.fail(f"{where}: {str(path)!r} is no file", where)
        return path
