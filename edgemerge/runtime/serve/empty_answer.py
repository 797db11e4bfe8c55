"""An answer of no tokens."""

from __future__ import annotations

import time
import uuid
from typing import Any

__all__ = ["empty_completion"]


def empty_completion(model: str, n_tokens: int) -> dict[str, Any]:
    """Answer of no tokens, as `Llama.create_completion` writes it."""
    choice = {"text": "", "index": 0, "logprobs": None, "finish_reason": "length"}
    return {
        "id": f"cmpl-{uuid.uuid4()}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": {"prompt_tokens": n_tokens, "completion_tokens": 0, "total_tokens": n_tokens},
    }
