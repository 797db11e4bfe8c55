"""llama.cpp in a process of its own, for what is asked of it while a merge is prepared.

It takes more memory than a merge's budget may have, and is gone before the merge begins.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from edgemerge.errors import RecipeError, RuntimeFailure
from edgemerge.process import wait_briefly

__all__ = ["ask_llama"]


def ask_llama(module: str, model: Path, question: bytes, *, what: str, shown: Path) -> bytes:
    """Run one of our modules, which loads a model, and return what it answers.

    Parameters
    ----------
    module : str
        Its whole name; it gets the model's path as its argument, and the question from stdin.
    model : Path
        A GGUF file.
    question : bytes
        As the module reads it.
    what : str
        What llama.cpp is needed for, for errors.
    shown : Path
        The model's name for errors.

    Raises
    ------
    RecipeError
        llama-cpp-python is not installed.
    RuntimeFailure
        The process could not be started, or ended without an answer.
    """
    if find_spec("llama_cpp") is None:
        raise RecipeError(
            f"{what} needs llama.cpp: install it with pip install 'edgemerge[run]', or write "
            "gate_mode: random",
            field="gate_mode",
        )
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    wait_briefly(environment)
    try:
        done = subprocess.run(
            # With -P nothing in the user's folder is taken for a module.
            [sys.executable, "-P", "-m", module, str(model)],
            input=question,
            capture_output=True,
            check=False,
            env=environment,
        )
    except OSError as error:
        raise RuntimeFailure(
            f"{shown}: no process for llama.cpp can be started ({error.strerror})"
        ) from error
    if not done.stdout:
        raise RuntimeFailure(
            f"{shown}: llama.cpp does not load it; update llama-cpp-python, or free some memory",
            detail=done.stderr.decode(errors="replace").strip()[-2000:],
        )
    return done.stdout
