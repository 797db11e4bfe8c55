"""Chats by the model's own template, run under limits (`template_process`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
from llama_cpp.llama_chat_format import (
    ChatFormatterResponse,
    chat_formatter_to_chat_completion_handler,
)

from edgemerge.errors import RuntimeFailure
from edgemerge.runtime.serve.errors import Refusal
from edgemerge.runtime.template_process import TemplateProcess, TemplateRefusal

__all__ = ["make_chat_handler"]


def make_chat_handler(llama: llama_cpp.Llama, source: str | None, path: Path) -> Any:
    """Make what llama-cpp-python calls for a chat: as its `Jinja2ChatFormatter`, in another process.

    What is made raises `Refusal` (400) where the template does not take the messages.

    Parameters
    ----------
    llama : Llama
        The model; the process ends when it is closed.
    source : str or None
        Its template, if it has one.
    path : Path
        Its file, for messages.

    Raises
    ------
    RuntimeFailure
        The template is no valid Jinja, or takes too much even to compile.
    """
    if source is None:
        return _refuse_chat
    try:
        template = TemplateProcess(source)
    except TemplateRefusal as error:
        raise RuntimeFailure(f"{path}: its chat template does not work ({error})") from error
    llama._stack.callback(template.close)
    eos_token = llama.token_eos()
    bos, eos = (
        llama._model.token_get_text(token) if token != -1 else ""
        for token in (llama.token_bos(), eos_token)
    )

    def ends(tokens: Sequence[int], _logits: Any) -> bool:
        return bool(tokens[-1] == eos_token)

    def write_prompt(**names: Any) -> ChatFormatterResponse:
        names |= {"bos_token": bos, "eos_token": eos, "add_generation_prompt": True}
        try:
            prompt = template.render(names)
        except TemplateRefusal as error:
            raise Refusal(
                400, f"the model's chat template does not take these messages: {error}"
            ) from error
        return ChatFormatterResponse(
            prompt=prompt,
            stop=[eos],
            stopping_criteria=llama_cpp.StoppingCriteriaList([ends]),
            added_special=True,
        )

    return chat_formatter_to_chat_completion_handler(write_prompt)


def _refuse_chat(**_request: Any) -> Any:
    raise Refusal(400, "this model has no chat template: use /v1/completions")
