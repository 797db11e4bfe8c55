"""From the document of a mergekit YAML file to a `Recipe`, key by key.

The schema is mergekit's; our additions stand under the one key `edgemerge`. Unknown keys are refused
by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edgemerge.recipe.values import ValueReader, check_alignment, is_utf8
from edgemerge.types import ModelInput, Recipe, Slice

__all__ = ["RecipeReader"]

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
OWN_KEYS = ("type", "tensor_types", "imatrix", "memory", "seed", "align", "neurons")


class RecipeReader(ValueReader):
    """Reads one recipe."""

    def recipe(self, document: Mapping[str, Any]) -> Recipe:
        """Read the whole document.

        Raises
        ------
        RecipeError
            It asks for something that does not exist.
        """
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
            tensor_types=self.tensor_types(own.get("tensor_types", {})),
            imatrix=self.imatrix(own.get("imatrix")),
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
        """Read models or slices."""
        if ("models" in document) == ("slices" in document):
            self.fail("needs either models or slices, one of the two", "models")
        if "models" in document:
            return (Slice(tuple(self.models(document["models"]))),)
        return tuple(
            self.slice(entry, f"slices[{i}]")
            for i, entry in enumerate(self.sequence(document["slices"], "slices"))
        )

    def models(self, entries: Any) -> Iterable[ModelInput]:
        """Read the list of models."""
        for i, entry in enumerate(self.sequence(entries, "models")):
            where = f"models[{i}]"
            entry = self.mapping(entry, where)
            self.check_keys(entry, MODEL_KEYS, where)
            yield ModelInput(
                self.model_path(entry.get("model"), f"{where}.model"),
                parameters=self.parameters(entry.get("parameters"), f"{where}.parameters"),
            )

    def slice(self, entry: Any, where: str) -> Slice:
        """Read one slice."""
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
        """Read a half-open range of layers."""
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

    def tensor_types(self, value: Any) -> tuple[tuple[str, str], ...]:
        """Read patterns of names and the ggml types of the tensors that they find."""
        where = "edgemerge.tensor_types"
        table = self.mapping(value, where)
        return tuple((str(pattern), self.text(table, pattern, where)) for pattern in table)

    def imatrix(self, value: Any) -> Path | None:
        """Find the importance matrix."""
        return None if value is None else self.file_path(value, "edgemerge.imatrix")

    def alignment(self, value: Any) -> str | None:
        """Read how heads are aligned."""
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
        """Read the template; None for the tokenizer source's own."""
        if value is None or value == "auto":
            return None
        if not isinstance(value, str) or "{" not in value or not is_utf8(value):
            self.fail(
                f"chat_template {value!r} is no Jinja text; give the template itself, or auto for "
                "the tokenizer source's own",
                "chat_template",
            )
        return value
