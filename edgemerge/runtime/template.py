"""Turn a conversation into the text that a model was trained on, by the model's own chat template.

The template is Jinja from a stranger's file, so it runs in Jinja's sandbox. Blocks, extensions,
filters and functions are those of transformers' `apply_chat_template` (`_compile_jinja_template` in
utils/chat_template_utils.py): a template that works there gives the same text here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from edgemerge.errors import FormatError

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    from edgemerge.runtime.llama import Model

__all__ = ["Message", "Template", "load_template"]

Message = Mapping[
    str, str
]  # role (system, user or assistant) and content, as in OpenAI's interface

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
    """

    def __init__(self, source: str, path: Path, *, bos: str = "", eos: str = "") -> None:
        self.path = path
        self._tokens = {"bos_token": bos, "eos_token": eos}
        try:
            self._compiled = _environment().from_string(source)
        except Exception as error:  # whatever Jinja or Python makes of a stranger's text
            raise self._failure(error) from error

    def render(self, messages: Sequence[Message]) -> str:
        """Write a conversation, up to where the model's answer begins.

        A template that has no place for a system prompt, as of Gemma 2, gets it in front of the
        first message of the user.

        Parameters
        ----------
        messages : sequence of Message
            A system prompt or none, then user and assistant by turns; the last is the user's.

        Raises
        ------
        FormatError
            The template fails, or refuses these messages.
        """
        if messages[0]["role"] == "system" and not self.takes_system:
            messages = _fold_system(messages)
        try:
            return self._render(messages)
        except Exception as error:  # a stranger's code: it may raise anything
            raise self._failure(error) from error

    @cached_property
    def takes_system(self) -> bool:
        """Whether a system prompt shows in what the template writes."""
        probe = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "?"}]
        try:
            return _PROBE in self._render(probe)
        except Exception:  # the template's own refusal; any other fault shows again in `render`
            return False

    def _render(self, messages: Sequence[Message]) -> str:
        return self._compiled.render(
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=True,
            **self._tokens,
        )

    def _failure(self, error: Exception) -> FormatError:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        return FormatError(
            f"its chat template does not work ({reason}); give another with --template FILE",
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
        try:
            source = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"not UTF-8 text ({error.reason})", path=file) from error
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
    from jinja2.meta import find_undeclared_variables

    return "messages" in find_undeclared_variables(_environment().parse(source))


def _fold_system(messages: Sequence[Message]) -> list[Message]:
    system, first, *rest = messages
    text = f"{system['content']}\n\n{first['content']}"
    return [{"role": first["role"], "content": text}, *rest]


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks for training what the model said; here it only has a content."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration is not a ClassVar)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda format_: datetime.now().strftime(format_)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as it is; Jinja's own filter would write < and & for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
