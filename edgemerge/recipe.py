"""What the user asks for: a mergekit YAML file, or flags, as a checked `Recipe`.

The schema is mergekit's (merge_method, base_model, models | slices, parameters, dtype, out_dtype,
tokenizer_source, chat_template); our additions stand under the one key `edgemerge`. Unknown keys
are refused by name. How parameters are looked up for one tensor is in `edgemerge.parameters`.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from edgemerge.errors import RecipeError
from edgemerge.sizes import parse_size
from edgemerge.types import Gradient, ModelInput, Parameters, Recipe, Rule, Setting, Slice
from edgemerge.yaml_file import read_yaml

__all__ = ["MAX_SEED", "check_alignment", "load_recipe", "make_recipe"]

MAX_SEED = (1 << 64) - 1  # the file keeps it as u64
DTYPES = ("float32", "float16", "bfloat16")
OUT_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
TOP_KEYS = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "chat_template",
    "name",
    "edgemerge",
)
MODEL_KEYS = ("model", "parameters")
SLICE_KEYS = ("sources", "parameters")
SOURCE_KEYS = ("model", "layer_range", "parameters")
OWN_KEYS = ("type", "memory", "seed", "align", "neurons")
ALIGNMENTS = ("hard", "soft", "off")

# mergekit's parameter names: per model, then for the whole merge.
MODEL_PARAMETERS = ("weight", "density", "gamma", "epsilon", "scale")
GLOBAL_PARAMETERS = ("normalize", "lambda", "rescale", "int8_mask", "t", "weighting", "scope")
PARAMETERS = MODEL_PARAMETERS + GLOBAL_PARAMETERS
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.ASCII | re.IGNORECASE)


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read a mergekit recipe from a YAML file.

    Model paths are taken from the working directory, else from the recipe's folder.

    Raises
    ------
    RecipeError
        The file cannot be read, is no YAML, or asks for something that does not exist.
    """
    path = Path(path)
    document = read_yaml(path)
    if not isinstance(document, dict):
        raise RecipeError(
            "is not a recipe: it needs keys such as merge_method and models", path=path
        )
    return _Reader(path).recipe(document)


def make_recipe(
    method: str,
    models: Sequence[tuple[str, float | None]],
    *,
    base: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    out_type: str | None = None,
    memory: int | None = None,
    seed: int = 0,
    align: str | None = None,
    neurons: bool = False,
) -> Recipe:
    """Build a recipe from flags.

    Parameters
    ----------
    method : str
        A key of `edgemerge.methods.METHODS`.
    models : sequence of (path, weight)
        The models to merge; a weight of None is 1.0.
    base : str, optional
        The common base, for the methods that need one.
    parameters : mapping, optional
        mergekit's parameter names -> number, bool, text, or list of numbers (a gradient).
    out_type : str, optional
        File type of the output, or `keep`.
    memory : int, optional
        Budget in bytes.
    seed : int
        Of the random methods and of the alignment's sketches.
    align : str, optional
        hard, soft or off: whether attention heads are brought into the base's order (without a base,
        the first model's); by default what the method does.
    neurons : bool
        Match feed-forward neurons too; for models trained apart.
    """
    reader = _Reader(None)
    inputs = []
    for text, weight in models:
        own = {} if weight is None else {"weight": reader.rules(weight, f"the weight of {text}")}
        inputs.append(ModelInput(reader.model_path(text, "model"), parameters=own))
    return Recipe(
        method=method,
        base=reader.model_path(base, "--base") if base is not None else None,
        slices=(Slice(tuple(inputs)),),
        parameters=reader.parameters(dict(parameters or {}), "-P"),
        defaults={"weight": (Rule(1.0),)},
        out_type=out_type,
        memory=memory,
        seed=reader.seed(seed, "seed"),
        align=check_alignment(align) if align is not None else None,
        neurons=neurons,
    )


def check_alignment(value: str) -> str:
    """Refuse what is no way to align.

    Raises
    ------
    RecipeError
        It is none of hard, soft and off.
    """
    if value not in ALIGNMENTS:
        raise RecipeError(
            f"alignment is {_brief(value)}; choose one of {', '.join(ALIGNMENTS)}", field="align"
        )
    return value


class _Reader:
    """Checks one document, key by key; `path` is the recipe's, for its errors and its models."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.notes: list[str] = []

    def fail(self, message: str, field: str | None = None) -> NoReturn:
        raise RecipeError(message, path=self.path, field=field)

    def recipe(self, document: Mapping[str, Any]) -> Recipe:
        self.check_keys(document, TOP_KEYS, "the recipe")
        method = self.text(document, "merge_method")
        base = document.get("base_model")
        own = self.mapping(document.get("edgemerge") or {}, "edgemerge")
        self.check_keys(own, OWN_KEYS, "edgemerge")
        dtype, out_type = self.types(document, own)
        return Recipe(
            method=method,
            base=self.model_path(base, "base_model") if base is not None else None,
            slices=self.slices(document),
            parameters=self.parameters(document.get("parameters", {}), "parameters"),
            out_type=out_type,
            dtype=dtype,
            memory=self.memory(own["memory"]) if "memory" in own else None,
            seed=self.seed(own.get("seed", 0), "edgemerge.seed"),
            align=self.alignment(own.get("align")),
            neurons=self.switch(own.get("neurons", False), "edgemerge.neurons"),
            tokenizer_source=self.tokenizer_source(document.get("tokenizer_source", "base")),
            chat_template=self.chat_template(document.get("chat_template")),
            notes=tuple(self.notes),
        )

    # -- keys of the top level --------------------------------------------------------------------

    def slices(self, document: Mapping[str, Any]) -> tuple[Slice, ...]:
        if ("models" in document) == ("slices" in document):
            self.fail("needs either models or slices, one of the two", "models")
        if "models" in document:
            return (Slice(tuple(self.models(document["models"]))),)
        return tuple(
            self.slice(entry, f"slices[{i}]")
            for i, entry in enumerate(self.sequence(document["slices"], "slices"))
        )

    def models(self, entries: Any) -> Iterable[ModelInput]:
        for i, entry in enumerate(self.sequence(entries, "models")):
            where = f"models[{i}]"
            entry = self.mapping(entry, where)
            self.check_keys(entry, MODEL_KEYS, where)
            yield ModelInput(
                self.model_path(entry.get("model"), f"{where}.model"),
                parameters=self.parameters(entry.get("parameters"), f"{where}.parameters"),
            )

    def slice(self, entry: Any, where: str) -> Slice:
        entry = self.mapping(entry, where)
        self.check_keys(entry, SLICE_KEYS, where)
        sources = []
        for i, source in enumerate(self.sequence(entry.get("sources"), f"{where}.sources")):
            at = f"{where}.sources[{i}]"
            source = self.mapping(source, at)
            self.check_keys(source, SOURCE_KEYS, at)
            sources.append(
                ModelInput(
                    self.model_path(source.get("model"), f"{at}.model"),
                    self.layer_range(source.get("layer_range"), f"{at}.layer_range"),
                    self.parameters(source.get("parameters"), f"{at}.parameters"),
                )
            )
        if len({stop - start for start, stop in (s.layer_range or (0, 0) for s in sources)}) > 1:
            self.fail(f"the sources of {where} have layer ranges of different lengths", where)
        return Slice(
            tuple(sources), self.parameters(entry.get("parameters"), f"{where}.parameters")
        )

    def layer_range(self, value: Any, where: str) -> tuple[int, int]:
        pair = self.sequence(value, where)
        if len(pair) != 2 or any(type(n) is not int for n in pair) or not 0 <= pair[0] < pair[1]:
            self.fail(f"{where} must be [first, last + 1] with 0 <= first <= last", where)
        return pair[0], pair[1]

    def types(
        self, document: Mapping[str, Any], own: Mapping[str, Any]
    ) -> tuple[str | None, str | None]:
        """Read working and file type; only out_dtype and edgemerge.type name the file type."""
        dtype, out_dtype = document.get("dtype"), document.get("out_dtype")
        for key, value in (("dtype", dtype), ("out_dtype", out_dtype)):
            if value is not None and value not in DTYPES:
                self.fail(f"{key} is {value!r}; choose one of {', '.join(DTYPES)}", key)
        if dtype == "bfloat16" and out_dtype is None and "type" not in own:
            self.notes.append(
                "dtype bfloat16 would lose part of the merged change; arithmetic is float32 and "
                "the output type is not changed by it (edgemerge: {type: BF16} insists)"
            )
        if "type" in own:
            return dtype, self.text(own, "type", "edgemerge.type")
        return dtype, OUT_DTYPES[out_dtype] if out_dtype else None

    def memory(self, value: Any) -> int:
        try:
            return parse_size(value)
        except RecipeError as error:
            self.fail(f"edgemerge.memory: {error}", error.field)

    def seed(self, value: Any, where: str) -> int:
        if type(value) is not int or not 0 <= value <= MAX_SEED:
            self.fail(f"{where} must be a whole number from 0 to 2^64 - 1", "seed")
        return value

    def switch(self, value: Any, where: str) -> bool:
        if not isinstance(value, bool):
            self.fail(f"{where} is {_brief(value)}; it must be true or false", where)
        return value

    def alignment(self, value: Any) -> str | None:
        if value is None:
            return None
        # YAML 1.1 reads a bare `off` as a switch.
        return check_alignment("off" if value is False else value)

    def tokenizer_source(self, value: Any) -> str:
        """Return base, union, or the path of a model; mergekit also writes `model:PATH`."""
        if value is None:
            return "base"
        if value in ("base", "union"):
            return str(value)
        if isinstance(value, str):
            value = value.removeprefix("model:")
        return str(self.model_path(value, "tokenizer_source"))

    def chat_template(self, value: Any) -> str | None:
        if value is None or value == "auto":
            return None
        if not isinstance(value, str) or "{" not in value or not _is_utf8(value):
            self.fail(
                f"chat_template {value!r} is no Jinja text; give the template itself, or auto for "
                "the tokenizer source's own",
                "chat_template",
            )
        return value

    # -- parameters -------------------------------------------------------------------------------

    def parameters(self, value: Any, where: str) -> Parameters:
        table = self.mapping(value if value is not None else {}, where)
        for name in table:
            if name not in PARAMETERS:
                self.fail(
                    f"{where} has the unknown parameter {name!r}{_suggest(name, PARAMETERS)}", name
                )
        dot = " " if where == "-P" else "."
        return {name: self.rules(entry, f"{where}{dot}{name}") for name, entry in table.items()}

    def rules(self, value: Any, where: str) -> tuple[Rule, ...]:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return tuple(self.rule(entry, where) for entry in value)
        return (Rule(self.setting(value, where)),)

    def rule(self, entry: Any, where: str) -> Rule:
        entry = self.mapping(entry, where)
        self.check_keys(entry, ("filter", "value"), where)
        name = entry.get("filter")
        if "value" not in entry or not (name is None or isinstance(name, str)):
            self.fail(f"{where} needs entries of the form {{filter: TEXT, value: NUMBER}}", where)
        return Rule(self.setting(entry["value"], where), None if name == "*" else name)

    def setting(self, value: Any, where: str) -> Setting | Gradient:
        if isinstance(value, list):
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
            f"{where} is {_brief(value)}; it must be a finite number, true, false or text", where
        )

    def number(self, value: Any) -> float | None:
        """Return a finite number; YAML 1.1 takes 1e-3, without a point, for text."""
        if isinstance(value, str) and not NUMBER.fullmatch(value):
            return None
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            return None
        try:
            number = float(value)
        except OverflowError:
            return None
        return number if math.isfinite(number) else None

    # -- small checks -----------------------------------------------------------------------------

    def check_keys(self, table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
        for key in table:
            if key not in known:
                self.fail(f"{where} has the unknown key {key!r}{_suggest(key, known)}", key)

    def mapping(self, value: Any, where: str) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            self.fail(f"{where} must be a table of keys and values", where)
        return value

    def sequence(self, value: Any, where: str) -> Sequence[Any]:
        if not isinstance(value, list) or not value:
            self.fail(f"{where} must be a list that is not empty", where)
        return value

    def text(self, table: Mapping[str, Any], key: str, where: str | None = None) -> str:
        value = table.get(key)
        if not isinstance(value, str) or not value:
            self.fail(f"{where or key} is missing or is no text", key)
        return value

    def model_path(self, value: Any, where: str) -> Path:
        """Find a model as mergekit does, in the working directory, else beside the recipe."""
        if isinstance(value, dict) and isinstance(value.get("model"), dict):
            value = value["model"].get("path")
        if not isinstance(value, str) or not value:
            self.fail(f"{where} must be the path of a model", where)
        if not _is_utf8(value):
            self.fail(f"{where}: the name {value!r} is not UTF-8; rename it", where)
        folders = [Path()] if self.path is None else [Path(), self.path.parent]
        for folder in folders:
            found = folder / os.path.expanduser(value)  # unlike Path's, it never raises
            if os.path.exists(found):  # unlike Path.exists, False for what can be no name
                return found.resolve()
        if "+" in value:
            self.fail(f"{where}: {value!r} is not here; merge LoRA adapters into their model first")
        self.fail(
            f"{where}: no file or folder {value!r}; download the model and give its path", where
        )


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_utf8(text: str) -> bool:
    """Tell whether a text can be written to a file; half a surrogate pair cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _suggest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
