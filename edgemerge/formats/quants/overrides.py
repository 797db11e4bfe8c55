"""Types for single tensors: `--tensor-type PATTERN=TYPE`, as llama-quantize has it.

The rules are those of `llama_tensor_get_type` in llama.cpp's src/llama-quant.cpp at 0c1e57098. A regular
expression is searched in the GGUF name. The first that is found decides. Tensors that the file type does not
quantise (norms, routers, vectors) keep their types.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from edgemerge.errors import RecipeError
from edgemerge.formats.quants.codec import CODECS

__all__ = ["TypeOverrides"]

FIELD = "tensor_types"
# What C++'s ECMAScript expressions, which llama.cpp uses, and Python's read differently.
_FOREIGN = re.compile(r"\(\?(?![:=!])|\[[:.=]|\\[AZ]")


class TypeOverrides:
    """Patterns of names and the ggml types of the tensors that they find.

    Parameters
    ----------
    pairs : sequence of (pattern, type)
        A regular expression and a ggml type name (any case); asked in this order.

    Raises
    ------
    RecipeError
        A pattern is no expression that llama.cpp reads alike, or a type is none that can be written.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]] = ()) -> None:
        self._rows = [(_compile(pattern), _written_type(dtype)) for pattern, dtype in pairs]
        self._used: set[str] = set()

    def choose(self, name: str) -> str | None:
        """Return the type of a tensor, None where no pattern is found in its name."""
        for pattern, dtype in self._rows:
            if pattern.search(name):
                self._used.add(pattern.pattern)
                return dtype
        return None

    def unused(self) -> list[str]:
        """Patterns that decided nothing so far."""
        patterns = [pattern.pattern for pattern, _ in self._rows]
        return [pattern for pattern in patterns if pattern not in self._used]

    def refuse_for(self, file_type: str) -> None:
        """Refuse any override: llama-quantize has them in quantised files only.

        Raises
        ------
        RecipeError
            There is one.
        """
        if self._rows:
            raise RecipeError(
                f"types for single tensors go with a quantised type, not {file_type}; "
                "give one, such as Q4_K_M",
                field=FIELD,
            )


def _compile(pattern: str) -> re.Pattern[str]:
    if _FOREIGN.search(pattern):
        raise RecipeError(
            f"the pattern {pattern!r} uses syntax that llama.cpp reads differently; write it "
            "without flags, named groups, look-behind and named classes",
            field=FIELD,
        )
    try:
        return re.compile(pattern, re.ASCII)
    except re.error as error:
        raise RecipeError(
            f"the pattern {pattern!r} is no regular expression ({error}); correct it", field=FIELD
        ) from None


def _written_type(dtype: str) -> str:
    written = [name for name, codec in CODECS.items() if codec.can_encode]
    if dtype.upper() not in written:
        raise RecipeError(
            f"tensors cannot be written as {dtype!r}; choose one of {', '.join(written)}",
            field=FIELD,
        )
    return dtype.upper()
