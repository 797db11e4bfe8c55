"""From the document of a mergekit YAML file to a `Recipe`, key by key.

The schema is that of mergekit 0.1.5; our additions stand under the one key `edgemerge`. What mergekit ignores
is noted, and refused by a strict reader.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edgemerge.finding.cache import folder_name
from edgemerge.methods.table import METHODS, known_parameters
from edgemerge.recipe.templates import CHAT_TEMPLATES
from edgemerge.recipe.tokens import TOKENIZER_KEYS, TokenizerReader
from edgemerge.recipe.values import brief, check_alignment, check_format, is_utf8
from edgemerge.types import ModelInput, Parameters, Recipe, Slice

__all__ = ["RecipeReader"]

DTYPES = ("float64", "float32", "float16", "bfloat16")
OUT_DTYPES = {"float64": "F32", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
INPUT_KEYS = ("models", "slices", "modules")
TOP_KEYS = (
    "merge_method",
    "base_model",
    *INPUT_KEYS,
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "name",
    "edgemerge",
)
MODULE_KEYS = ("models", "slices", "parameters")
MODEL_KEYS = ("model", "parameters", "imatrix")
SLICE_KEYS = ("sources", "parameters", "base_model", "residual_weight")
SOURCE_KEYS = ("model", "layer_range", "parameters", "imatrix")
OWN_KEYS = ("type", "format", "tensor_types", "imatrix", "memory", "seed", "align", "neurons")
TEXT_MODULES = ("default", "text_decoder")  # as mergekit names the language model
# mergekit adds a base that `models` does not list. To these methods it is a model like the others.
BASE_IS_A_MODEL = ("linear", "karcher")
OTHER_KINDS = {
    "genome": "a configuration of mergekit-evolve, which searches for settings; write the settings that "
    "it found as a recipe with merge_method",
}


class RecipeReader(TokenizerReader):
    """Reads one recipe."""

    def recipe(self, document: Mapping[str, Any]) -> Recipe:
        """Read the whole document.

        Raises
        ------
        RecipeError
            It asks for something that does not exist.
        """
        self.check_kind(document)
        places = dict.fromkeys(OWN_KEYS, "edgemerge")
        places |= dict.fromkeys(TOKENIZER_KEYS, "tokenizer")
        places |= dict.fromkeys(known_parameters(), "parameters")
        self.check_keys(document, TOP_KEYS, "the recipe", places=places)
        method = self.text(document, "merge_method")
        self.base_path = base = self.base(document, "base_model")
        own = self.mapping(document.get("edgemerge") or {}, "edgemerge")
        self.check_own_keys(own, OWN_KEYS, "edgemerge")
        dtype, out_type = self.types(document, own)
        slices, parameters = self.inputs(document, method, base)
        tokenizer_source, tokens, multiple = self.tokenizer(document)
        return Recipe(
            method=method,
            base=base,
            slices=slices,
            parameters=parameters,
            out_format=self.out_format(own),
            out_type=out_type,
            dtype=dtype,
            tensor_types=self.tensor_types(own.get("tensor_types", {})),
            imatrix=self.imatrix(own.get("imatrix"), "edgemerge.imatrix"),
            memory=self.memory(own["memory"]) if "memory" in own else None,
            seed=self.seed(own.get("seed", 0), "edgemerge.seed"),
            align=self.alignment(own.get("align")),
            neurons=self.switch(own.get("neurons", False), "edgemerge.neurons"),
            tokenizer_source=tokenizer_source,
            tokens=tokens,
            pad_to_multiple_of=multiple,
            chat_template=self.chat_template(document.get("chat_template")),
            notes=tuple(dict.fromkeys(self.notes)),
        )

    def out_format(self, own: Mapping[str, Any]) -> str:
        """Take the form of the output: a GGUF, unless it says a directory."""
        return (
            check_format(self.text(own, "format", "edgemerge.format"))
            if "format" in own
            else "gguf"
        )

    def check_kind(self, document: Mapping[str, Any]) -> None:
        """Refuse configurations of mergekit's other programs."""
        for key, kind in OTHER_KINDS.items():
            if key in document and "merge_method" not in document:
                self.fail(f"is {kind}", key)

    # -- models ----------------------------------------------------------------------------------

    def inputs(
        self, document: Mapping[str, Any], method: str, base: Path | None
    ) -> tuple[tuple[Slice, ...], Parameters]:
        """Read models, slices or modules, and the parameters of the merge."""
        given = [key for key in INPUT_KEYS if document.get(key)]
        if len(given) != 1:
            self.fail("needs either models, slices or modules, one of them and not empty", "models")
        parameters = self.parameters(document.get("parameters"), "parameters")
        where = ""
        if "modules" in given:
            where, document = self.module(document["modules"])
            own = self.parameters(document.get("parameters"), f"{where}parameters")
            # One list of rules does for two levels: the first rule that fits a tensor decides.
            names = dict.fromkeys((*own, *parameters))
            parameters = {n: (*own.get(n, ()), *parameters.get(n, ())) for n in names}
        if document.get("models"):
            models = list(self.models(document["models"], f"{where}models"))
            self.add_base(models, method, base, parameters)
            return (Slice(tuple(models)),), parameters
        entries = self.sequence(document["slices"], f"{where}slices")
        slices = [self.slice(entry, f"{where}slices[{i}]") for i, entry in enumerate(entries)]
        return tuple(slices), parameters

    def module(self, value: Any) -> tuple[str, Mapping[str, Any]]:
        """Take the only module; return how its keys are called, and its table."""
        modules = self.mapping(value, "modules")
        others = [name for name in modules if name not in TEXT_MODULES]
        if others or len(modules) != 1:
            self.fail(
                f"modules names {', '.join(map(brief, others or modules))}, and only the language "
                "model can be merged; name the one module default",
                "modules",
            )
        ((name, entry),) = modules.items()
        where = f"modules.{name}"
        entry = self.mapping(entry, where)
        self.check_keys(entry, MODULE_KEYS, where)
        if bool(entry.get("models")) == bool(entry.get("slices")):
            self.fail(f"{where} needs either models or slices, one of the two", where)
        return f"{where}.", entry

    def models(self, entries: Any, where: str) -> Iterable[ModelInput]:
        """Read the list of models."""
        for i, entry in enumerate(self.sequence(entries, where)):
            at = f"{where}[{i}]"
            entry = self.mapping(entry, at)
            self.check_keys(entry, MODEL_KEYS, at, places=_inside_parameters())
            yield ModelInput(
                self.model_path(entry.get("model"), f"{at}.model"),
                parameters=self.parameters(entry.get("parameters"), f"{at}.parameters"),
                imatrix=self.imatrix(entry.get("imatrix"), f"{at}.imatrix"),
            )

    def add_base(
        self, models: list[ModelInput], method: str, base: Path | None, parameters: Parameters
    ) -> None:
        """Add the base to the models where mergekit does so, and the method has a use for it."""
        if base is None or method not in BASE_IS_A_MODEL or method not in METHODS:
            return
        of_models = METHODS[method].parameters_of(model=True)
        lacking = [n for n, p in of_models.items() if p.default is None and n not in parameters]
        if not lacking and base not in [model.path for model in models]:
            models.append(ModelInput(base))
            self.notes.append(f"the base {folder_name(base)} is one of the models, as in mergekit")

    def slice(self, entry: Any, where: str) -> Slice:
        """Read one slice."""
        entry = self.mapping(entry, where)
        self.check_keys(entry, SLICE_KEYS, where, places=_inside_parameters())
        if entry.get("residual_weight") is not None:
            self.notes.append(f"{where}.residual_weight has no effect, as in mergekit")
        base = self.base(entry, f"{where}.base_model")
        outer, self.base_path = self.base_path, base or self.base_path
        sources = []
        for i, source in enumerate(self.sequence(entry.get("sources"), f"{where}.sources")):
            at = f"{where}.sources[{i}]"
            source = self.mapping(source, at)
            self.check_keys(source, SOURCE_KEYS, at, places=_inside_parameters())
            sources.append(
                ModelInput(
                    self.model_path(source.get("model"), f"{at}.model"),
                    self.layer_range(source.get("layer_range"), f"{at}.layer_range"),
                    self.parameters(source.get("parameters"), f"{at}.parameters"),
                    self.imatrix(source.get("imatrix"), f"{at}.imatrix"),
                )
            )
        self.base_path = outer
        if len({stop - start for start, stop in (s.layer_range or (0, 0) for s in sources)}) > 1:
            self.fail(f"the sources of {where} have layer ranges of different lengths", where)
        return Slice(
            tuple(sources),
            self.parameters(entry.get("parameters"), f"{where}.parameters"),
            base,
        )

    def base(self, table: Mapping[str, Any], where: str) -> Path | None:
        """Read the base of the recipe, or of a slice."""
        value = table.get("base_model")
        return None if value is None else self.model_path(value, where)

    def layer_range(self, value: Any, where: str) -> tuple[int, int]:
        """Read a half-open range of layers."""
        pair = self.sequence(value, where)
        if len(pair) != 2 or any(type(n) is not int for n in pair) or not 0 <= pair[0] < pair[1]:
            self.fail(f"{where} must be [first, last + 1] with 0 <= first <= last", where)
        return pair[0], pair[1]

    # -- types -----------------------------------------------------------------------------------

    def types(
        self, document: Mapping[str, Any], own: Mapping[str, Any]
    ) -> tuple[str | None, str | None]:
        """Read working and file type; only out_dtype and edgemerge.type name the file type."""
        dtype, out_dtype = self.dtype(document, "dtype"), self.dtype(document, "out_dtype")
        if dtype == "float64":
            self.notes.append(
                "dtype float64: arithmetic is float32, and sums over a tensor are float64"
            )
        if out_dtype == "float64" and "type" not in own:
            self.notes.append("out_dtype float64 is not written; the output is F32")
        if dtype == "bfloat16" and out_dtype is None and "type" not in own:
            self.notes.append(
                "dtype bfloat16 would lose part of the merged change; arithmetic is float32 and "
                "the output type is not changed by it (edgemerge: {type: BF16} insists)"
            )
        if "type" in own:
            return dtype, self.text(own, "type", "edgemerge.type")
        return dtype, OUT_DTYPES[out_dtype] if out_dtype else None

    def dtype(self, document: Mapping[str, Any], key: str) -> str | None:
        """Read a type of numbers; mergekit also writes `torch.bfloat16`."""
        value = document.get(key)
        if value is None or value == "":
            return None
        name = value.removeprefix("torch.") if isinstance(value, str) else value
        if name not in DTYPES:
            self.fail(f"{key} is {brief(value)}; choose one of {', '.join(DTYPES)}", key)
        return str(name)

    def tensor_types(self, value: Any) -> tuple[tuple[str, str], ...]:
        """Read patterns of names and the ggml types of the tensors that they find."""
        where = "edgemerge.tensor_types"
        table = self.mapping(value, where)
        return tuple((str(pattern), self.text(table, pattern, where)) for pattern in table)

    def imatrix(self, value: Any, where: str) -> Path | None:
        """Find an importance matrix: of a model, or the one to quantise by."""
        return None if value is None else self.file_path(value, where)

    def alignment(self, value: Any) -> str | None:
        """Read how heads are aligned."""
        if value is None:
            return None
        # YAML 1.1 reads a bare `off` as a switch.
        return check_alignment("off" if value is False else value)

    def chat_template(self, value: Any) -> str | None:
        """Read the template; None for the tokenizer source's own, `auto` for the inputs' most common."""
        if value is None or value in ("", "auto"):
            return value or None
        if isinstance(value, str) and value in CHAT_TEMPLATES:
            return CHAT_TEMPLATES[value]
        if not isinstance(value, str) or "{" not in value or not is_utf8(value):
            self.fail(
                f"chat_template {brief(value)} is no Jinja text; give the template itself, auto for "
                f"the inputs' most common one, or one of {', '.join(CHAT_TEMPLATES)}",
                "chat_template",
            )
        return value


def _inside_parameters() -> dict[str, str]:
    return dict.fromkeys(known_parameters(), "its parameters")
