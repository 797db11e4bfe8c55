"""Merge fine-tuned language models on the device, inside a memory budget, into one GGUF."""

from edgemerge import interrupts as _interrupts  # noqa: F401 (makes Ctrl-C quiet)

# isort: split
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgemerge.errors import EdgemergeError
    from edgemerge.formats import open_model
    from edgemerge.merge import merge, plan
    from edgemerge.recipe import load_recipe, make_recipe

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
    "load_recipe": "recipe",
    "make_recipe": "recipe",
    "merge": "merge",
    "open_model": "formats",
    "plan": "merge",
}


class _Package(ModuleType):
    """A package in which `merge` and `plan` are functions, though modules have these names too."""

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            value: Any = version("edgemerge")
        elif name in _HOMES:
            value = getattr(import_module(f"edgemerge.{_HOMES[name]}"), name)
        else:
            raise AttributeError(f"module 'edgemerge' has no attribute {name!r}")
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # An import of edgemerge.merge by its full name ends with setting it here, over the function.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
