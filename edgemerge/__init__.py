"""Merge fine-tuned language models on the device, inside a memory budget, into one GGUF."""

from edgemerge import interrupts as _interrupts  # noqa: F401 (makes Ctrl-C quiet)

# isort: split
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgemerge.errors import EdgemergeError
    from edgemerge.formats import open_model
    from edgemerge.merging.run import merge, plan
    from edgemerge.recipe.recipe import load_recipe, make_recipe

    __version__: str

__all__ = [
    "EdgemergeError",
    "__version__",
    "load_recipe",
    "make_recipe",
    "merge",
    "open_model",
    "plan",
]

# Imported when they are asked for: NumPy alone would double the time of `edgemerge --help`.
_HOMES = {
    "EdgemergeError": "errors",
    "load_recipe": "recipe.recipe",
    "make_recipe": "recipe.recipe",
    "merge": "merging.run",
    "open_model": "formats",
    "plan": "merging.run",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("edgemerge")
    elif name in _HOMES:
        value = getattr(import_module(f"edgemerge.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module 'edgemerge' has no attribute {name!r}")
    globals()[name] = value
    return value
