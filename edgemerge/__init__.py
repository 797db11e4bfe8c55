"""Merge fine-tuned language models on the device, inside a memory budget, into one GGUF."""

from edgemerge import interrupts as _interrupts  # noqa: F401 (makes Ctrl-C quiet)

# isort: split
from importlib.metadata import version

from edgemerge.errors import EdgemergeError
from edgemerge.formats import open_model
from edgemerge.merge import merge, plan
from edgemerge.recipe import load_recipe, make_recipe

__all__ = [
    "EdgemergeError",
    "__version__",
    "load_recipe",
    "make_recipe",
    "merge",
    "open_model",
    "plan",
]

__version__ = version("edgemerge")
