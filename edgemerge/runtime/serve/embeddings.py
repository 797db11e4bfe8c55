"""Embeddings from a context that also generates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemerge.runtime.library import load_library
from edgemerge.runtime.serve.active_request import current_run
from edgemerge.runtime.serve.errors import SERVER, Refusal
from edgemerge.runtime.serve.models import OUTPUTS
from edgemerge.types import Float32

if TYPE_CHECKING:
    from llama_cpp import Llama

__all__ = ["embed"]

_CLS, _LAST = "2", "3"  # enum llama_pooling_type of llama.h, as text of metadata


def embed(llama: Llama, tokens: Sequence[int]) -> list[float]:
    """Embed a text; the context must give embeddings just now, and is left dirty.

    Parameters
    ----------
    llama : llama_cpp.Llama
        The model.
    tokens : sequence of int
        At least one, and no more than the context holds.

    Returns
    -------
    list of float
        n_embd_out values, of length 1 together: the pooling that the GGUF names, else the mean over all
        tokens.

    Raises
    ------
    Refusal
        500: the model gives no numbers for this text.
    """
    context, batch = llama._ctx, llama._batch
    api = load_library().api
    width = api.llama_model_n_embd_out(llama.model)  # of LFM2's, not that of its layers
    context.kv_cache_clear()
    rows: list[Float32] = []
    step = len(tokens) if llama.reads_whole else OUTPUTS
    for first in range(0, len(tokens), step):
        current_run.get().check()
        part = list(tokens[first : first + step])
        batch.set_batch(batch=part, n_past=first, logits_all=True)
        context.decode(batch)
        raw = api.llama_get_embeddings(llama.ctx)
        rows.append(np.ctypeslib.as_array(raw, shape=(len(part), width)).copy())
    vector = _pool(np.concatenate(rows).astype(np.float64), llama.metadata)
    length = float(np.linalg.norm(vector))
    if not np.isfinite(length) or length == 0.0:
        raise Refusal(500, "the model's embedding of this text is no number", kind=SERVER)
    return [float(value) for value in vector / length]


def _pool(rows: Any, metadata: dict[str, str]) -> Any:
    """One row of (n_tokens, n_embd) float64."""
    kind = metadata.get(f"{metadata.get('general.architecture')}.pooling_type")
    if kind == _CLS:
        return rows[0]
    return rows[-1] if kind == _LAST else rows.mean(axis=0)
