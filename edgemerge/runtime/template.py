"""Turns a conversation into the text that a model was trained on, by the model's own chat template.

The template is Jinja from a stranger's file. It runs in Jinja's sandbox, in a process of its own
(`edgemerge.formats.template_process` starts it, `template_child` is it). Blocks, extensions, filters and
functions are those of transformers' `apply_chat_template` (`_compile_jinja_template` in
utils/chat_template_utils.py): a template that works there gives the same text here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from edgemerge.errors import FormatError
from edgemerge.formats.files import read_text
from edgemerge.formats.template_process import TemplateOverrun, TemplateProcess, TemplateRefusal

if TYPE_CHECKING:
    from edgemerge.runtime.llama import Model

__all__ = ["Message", "Template", "load_template"]

Message = Mapping[str, Any]  # role (system, user or assistant) and content, as OpenAI has them

MAX_BYTES = 1 << 20  # of a template; the longest published has 12 KB
_PROBE = "a-word-that-no-template-has"


class Template:
    """A chat template.

    Parameters
    ----------
    source : str
        Jinja.
    path : Path
        The file it is from, for messages.
    bos, eos : str
        Text of the model's tokens that begin and end a sequence.

    Raises
    ------
    FormatError
        It is no valid Jinja.
    RuntimeFailure
        Jinja is not installed, or cannot be started.
    """

    def __init__(self, source: str, path: Path, *, bos: str = "", eos: str = "") -> None:
        self.path = path
        self._tokens = {"bos_token": bos, "eos_token": eos}
        try:
            self._process = TemplateProcess(source)
        except TemplateRefusal as error:
            raise self._failure(error) from error

    def render(
        self, messages: Sequence[Message], names: Mapping[str, Any] = MappingProxyType({})
    ) -> str:
        """Write a conversation, up to where the model's answer begins.

        A template that has no place for a system prompt, as of Gemma 2, gets it in front of the
        user's message that follows it, or as one.

        Parameters
        ----------
        messages : sequence of Message
            System prompts or none, then user and assistant by turns; the last is the user's.
        names : mapping
            What the template finds beside them, as `tools`.

        Raises
        ------
        FormatError
            The template fails, refuses these messages, or takes too much time or memory.
        """
        try:
            if any(one["role"] == "system" for one in messages) and not self.takes_system:
                messages = _fold_system(messages)
            return self._render(messages, names)
        except TemplateRefusal as error:
            raise self._failure(error) from error

    @cached_property
    def takes_system(self) -> bool:
        """Whether a system prompt shows in what the template writes."""
        probe = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "?"}]
        try:
            return _PROBE in self._render(probe)
        except TemplateOverrun:
            raise
        except TemplateRefusal:
            return False  # its own refusal; any other fault shows again in `render`

    def _render(
        self, messages: Sequence[Message], names: Mapping[str, Any] = MappingProxyType({})
    ) -> str:
        return self._process.render(
            {
                "messages": [dict(message) for message in messages],
                "tools": None,
                "documents": None,
                "add_generation_prompt": True,
                **self._tokens,
                **names,
            }
        )

    def _failure(self, error: TemplateRefusal) -> FormatError:
        return FormatError(
            f"its chat template does not work ({error}); give another with --template FILE",
            path=self.path,
        )


def load_template(model: Model, file: Path | None = None) -> Template | None:
    """Take a model's own chat template, or the one in a file; None where there is neither.

    Parameters
    ----------
    model : Model
        A loaded model.
    file : Path, optional
        A Jinja template to use instead of the model's.

    Raises
    ------
    FormatError
        The template is no valid Jinja or never uses `messages`, or the file is not UTF-8.
    """
    source, path = model.chat_template, model.path
    if file is not None:
        path = file
        source = read_text(file, MAX_BYTES)
    if source is None:
        return None
    bos, eos = (
        model.token_text(int(model.metadata.get(f"tokenizer.ggml.{name}_token_id", "-1")))
        for name in ("bos", "eos")
    )
    template = Template(source, path, bos=bos, eos=eos)
    if not _uses_messages(source):
        raise FormatError(
            "it never uses 'messages', so it is no chat template; give another with --template FILE",
            path=path,
        )
    return template


def _uses_messages(source: str) -> bool:
    """Look into what stands between Jinja's braces; the template itself runs elsewhere."""
    opened = re.split(r"\{[{%]", source)[1:]  # in one pass, also where strangers never close them
    return any("messages" in re.split(r"[}%]\}", part, maxsplit=1)[0] for part in opened)


def _fold_system(messages: Sequence[Message]) -> list[Message]:
    """Have the user say what the system says, as llama.cpp does (minja's `polyfill_system_role`)."""
    folded: list[Message] = []
    prompts: list[str] = []
    for message in messages:
        if message["role"] == "system":
            prompts.append(message["content"])
            continue
        if message["role"] == "user":
            message = {**message, "content": "\n\n".join([*prompts, message["content"]])}
        elif prompts:
            folded.append(_as_user(prompts))
        prompts = []
        folded.append(message)
    return [*folded, _as_user(prompts)] if prompts else folded


def _as_user(prompts: Sequence[str]) -> Message:
    return {"role": "user", "content": "\n\n".join(prompts)}
