"""Hidden states between the layers of a model, as llama.cpp computes them."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgemerge.formats.llama_process import ask_llama, load_backends
from edgemerge.types import Float32

__all__ = ["last_states"]

OUTPUT = b"l_out-"  # llama.cpp's name of what a layer hands on
LEAST_CONTEXT = 32


def last_states(
    path: Path, prompts: Sequence[Sequence[int]], n_layers: int, n_embd: int
) -> Float32:
    """Return what each layer but the last hands on at the last token of each prompt.

    Parameters
    ----------
    path : Path
        A GGUF file.
    prompts : sequence of sequences of int
        Token ids, one or more in each.
    n_layers, n_embd : int
        Of the model.

    Returns
    -------
    (n_prompts, n_layers - 1, n_embd) float32

    Raises
    ------
    RecipeError
        llama-cpp-python is not installed.
    RuntimeFailure
        llama.cpp does not load or run the model.
    """
    shape = (len(prompts), n_layers - 1, n_embd)
    question = json.dumps([[list(prompt) for prompt in prompts], n_layers, n_embd]).encode()
    raw = ask_llama(__name__, path, question, what="gate_mode hidden", shown=path)
    return np.frombuffer(raw, "<f4").reshape(shape)


def _answer(path: str) -> None:
    """Read prompts from stdin; write the states as float32."""
    import llama_cpp as api
    from llama_cpp._ggml import libggml

    load_backends(api)
    prompts, n_layers, n_embd = json.load(sys.stdin)
    states = np.zeros((len(prompts), n_layers - 1, n_embd), np.float32)
    number = 0
    libggml.ggml_get_name.restype = ctypes.c_char_p
    libggml.ggml_nbytes.restype = ctypes.c_size_t

    def read(tensor: int, is_asked: bool, _data: object) -> bool:
        name: bytes = libggml.ggml_get_name(ctypes.c_void_p(tensor))
        if not name.startswith(OUTPUT) or int(name[len(OUTPUT) :]) >= n_layers - 1:
            return not is_asked
        if not is_asked:
            row = states[number, int(name[len(OUTPUT) :])]
            n_bytes = libggml.ggml_nbytes(ctypes.c_void_p(tensor))
            libggml.ggml_backend_tensor_get(
                ctypes.c_void_p(tensor),
                ctypes.c_void_p(row.ctypes.data),
                ctypes.c_size_t(n_bytes - row.nbytes),  # the last token's
                ctypes.c_size_t(row.nbytes),
            )
        return True

    callback = api.ggml_backend_sched_eval_callback(read)
    context = _open(api, path, max(map(len, prompts)), callback)
    for number, prompt in enumerate(prompts):  # noqa: B007 (`read` looks at it)
        ids = (api.llama_token * len(prompt))(*prompt)
        api.llama_memory_clear(api.llama_get_memory(context), True)
        if api.llama_decode(context, api.llama_batch_get_one(ids, len(prompt))) != 0:
            return
    sys.stdout.buffer.write(states.tobytes())


def _open(api: Any, path: str, longest: int, callback: object) -> Any:
    model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
    parameters = api.llama_context_default_params()
    length = max(LEAST_CONTEXT, longest)
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = length
    parameters.n_threads = parameters.n_threads_batch = len(os.sched_getaffinity(0))
    parameters.cb_eval = callback
    return api.llama_init_from_model(model, parameters)


if __name__ == "__main__":
    _answer(sys.argv[1])
