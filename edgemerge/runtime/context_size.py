"""How long a context a loaded model can have on this board; `doctor.fit` judges those not loaded."""

from __future__ import annotations

from edgemerge.machine.process import read_process
from edgemerge.runtime.board.device import read_memory
from edgemerge.runtime.llama import Model
from edgemerge.runtime.worker import Worker

__all__ = ["choose_context"]

_LEAST = 512  # tokens: less is no use, whatever the memory
_PROBE = 256  # tokens
_SHARE = 0.8  # of the free memory; the rest is for llama.cpp's scratch and for everybody else


def choose_context(model: Model, wanted: int) -> int:
    """Take a wanted context, or the model's own or what the free memory holds where that is less.

    What a token needs is read off a small context, since it differs with the architecture: grouped
    heads, sliding windows, running states.

    Parameters
    ----------
    model : Model
        A loaded model.
    wanted : int
        Tokens.

    Returns
    -------
    int
        Tokens; not less than 512 for want of memory.
    """
    wanted = min(wanted, model.n_ctx_train)
    if wanted <= _LEAST:
        return wanted
    with Worker() as worker:
        bytes_per_token = worker.do(_measure, model)
    # Mapped weights count as a cache that can be dropped, hence as available; they must stay.
    free = read_memory().available - read_process().file
    return max(_LEAST, min(wanted, int(_SHARE * free / max(1.0, bytes_per_token))))


def _measure(model: Model) -> float:
    """Bytes of KV cache per token."""
    with model.context(_PROBE, n_batch=1) as probe:
        return probe.buffers.kv / probe.n_ctx
