"""llama.cpp in a process of its own, for what is asked of it while a merge is prepared.

It takes more memory than a merge's budget may have, and is gone before the merge begins. What such a process
and one that runs models need alike stands here, too: `load_backends`.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgemerge.errors import RecipeError, RuntimeFailure
from edgemerge.machine.process import wait_briefly

__all__ = ["ask_llama", "load_backends"]


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


def load_backends(api: Any) -> None:
    """Load ggml's backends where they are files beside libllama, which looks for them elsewhere.

    A wheel for many processors has them (`tools/llama/build-portable`), and ggml takes the best for this one.
    Where they are built in, nothing is done.

    Parameters
    ----------
    api : module
        `llama_cpp`.

    Raises
    ------
    RuntimeFailure
        None of them is for this processor.
    """
    path = api.llama_cpp._lib._name
    ggml = ctypes.CDLL(path)  # a handle whose declarations are ours
    ggml.ggml_backend_reg_count.restype = ctypes.c_size_t
    ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    if ggml.ggml_backend_reg_count():
        return
    folder = Path(path).parent
    ggml.ggml_backend_load_all_from_path.restype = None
    ggml.ggml_backend_load_all_from_path(ctypes.c_char_p(os.fsencode(folder)))
    if not ggml.ggml_backend_dev_count():
        raise RuntimeFailure(
            f"{folder} has no code of llama.cpp for this processor: install it again with "
            "pip install --force-reinstall --no-cache-dir 'edgemerge[run]'"
        )
