"""Prompts of requests as tokens, and requests that a model cannot take."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from edgemerge.errors import FormatError, RuntimeFailure
from edgemerge.runtime.engine.messages import Chat, Generation
from edgemerge.runtime.llama import Model
from edgemerge.runtime.template import Template

__all__ = [
    "Refused",
    "check_prompt",
    "check_tokens",
    "check_vectors",
    "read_generation",
    "read_pair",
    "read_prompt",
    "read_whole_text",
    "write_text",
]

_MOST_NUMBERS = 1 << 22  # of all vectors of a request; the server has them in 22 MB of base64


class Refused(Exception):
    """A request that the model cannot take; the text says why."""

    def __init__(self, reason: str, status: int = 400) -> None:
        self.status = status
        super().__init__(reason)


def read_prompt(model: Model, text: str) -> list[int]:
    """Tokens of a prompt, control tokens (`<|im_start|>`) understood, begun as the model wants it.

    A beginning of sequence that the text already has, as of a chat template, is not doubled.
    """
    tokens = model.tokenize(text, special=True)
    return tokens if model.bos and tokens[:1] == model.bos else model.bos + tokens


def check_prompt(tokens: Sequence[int], n_ctx: int) -> None:
    """Refuse a prompt that nothing can follow.

    Raises
    ------
    RuntimeFailure
        It is empty, or fills the context.
    """
    if not tokens:
        raise RuntimeFailure("the prompt is empty: give the model at least one word to go on from")
    if len(tokens) >= n_ctx:
        raise RuntimeFailure(
            f"the prompt has {len(tokens)} tokens and the context is {n_ctx}: shorten the prompt"
        )


def read_generation(
    model: Model, template: Template | None, wanted: Generation, n_ctx: int
) -> tuple[list[int], int]:
    """Tokens of a prompt, and how many of them were put before its text.

    Raises
    ------
    Refused
        It is empty, too long, has tokens that do not exist, or the template does not take it.
    """
    prompt = wanted.prompt
    if isinstance(prompt, Chat):
        prompt = _render(template, prompt)
    n_put = 0
    if isinstance(prompt, str):
        tokens = read_prompt(model, prompt)
        n_put = len(tokens) - len(model.tokenize(prompt, special=True))
    else:
        tokens = list(prompt)
        check_tokens(model, tokens)
    try:
        check_prompt(tokens, n_ctx)
    except RuntimeFailure as error:
        raise Refused(str(error)) from error
    bias = wanted.sampling.bias
    if not all(0 <= token < model.n_vocab for token, _ in bias):
        raise Refused(f"logit_bias: a token is not 0 to {model.n_vocab - 1}")
    return tokens, n_put


def _render(template: Template | None, chat: Chat) -> str:
    if template is None:
        raise Refused("this model has no chat template: use /v1/completions")
    try:
        return template.render(chat.messages, chat.names)
    except FormatError as error:
        raise Refused(
            f"the model's chat template does not take these messages: {error.__cause__}"
        ) from error


def check_tokens(model: Model, tokens: Sequence[int]) -> None:
    """Refuse what is no token: llama.cpp would end the process.

    Raises
    ------
    Refused
        There is one.
    """
    if not all(0 <= token < model.n_vocab for token in tokens):
        raise Refused(f"a token is not 0 to {model.n_vocab - 1}")


def check_vectors(n_texts: int, width: int) -> None:
    """Refuse more vectors than a request may have.

    Raises
    ------
    Refused
        There are more.
    """
    most = _MOST_NUMBERS // width
    if n_texts > most:
        raise Refused(
            f"{n_texts} inputs are too many for vectors of {width} numbers: send at most {most} at a time"
        )


def read_whole_text(model: Model, text: str | Sequence[int], n_ctx: int) -> list[int]:
    """Tokens of a text to embed, begun and ended as the model wants it.

    Raises
    ------
    Refused
        It is empty, too long, or has tokens that do not exist.
    """
    if isinstance(text, str):
        tokens = model.tokenize(text, special=True, add_special=True)
    else:
        tokens = list(text)
        check_tokens(model, tokens)
    if not tokens:
        raise Refused("the input is empty")
    if len(tokens) > n_ctx:
        raise Refused(f"an input has {len(tokens)} tokens and the context is {n_ctx}: shorten it")
    return tokens


def read_pair(model: Model, query: str, text: str, n_ctx: int) -> list[int]:
    """Tokens of a question and a text that may answer it, as llama-server's `format_prompt_rerank`.

    Raises
    ------
    Refused
        They are too long together.
    """
    api, vocab = model.api, model.vocab
    template = model.rank_template
    if template is not None:
        whole = template.replace("{query}", query).replace("{document}", text)
        tokens = model.tokenize(whole, special=True)
    else:
        end = api.llama_vocab_eos(vocab)
        end = api.llama_vocab_sep(vocab) if end < 0 else end
        ends = [end] if api.llama_vocab_get_add_eos(vocab) else []
        separators = [api.llama_vocab_sep(vocab)] if api.llama_vocab_get_add_sep(vocab) else []
        tokens = [*model.bos, *model.tokenize(query), *ends, *separators]
        tokens += [*model.tokenize(text), *ends]
    if len(tokens) > n_ctx:
        raise Refused(
            f"a text has {len(tokens)} tokens with the query and the context is {n_ctx}: shorten it"
        )
    return tokens


def write_text(model: Model, tokens: Sequence[int]) -> str:
    """Text that gives these tokens again: with control tokens, without a vocabulary's own space.

    Raises
    ------
    Refused
        A token does not exist, or llama.cpp cannot write them.
    """
    check_tokens(model, tokens)
    size = sum(len(model.piece(token)) for token in tokens) + 64 * len(tokens)
    ids = (ctypes.c_int32 * len(tokens))(*tokens)
    buffer = ctypes.create_string_buffer(size + 1)
    n = model.api.llama_detokenize(model.vocab, ids, len(tokens), buffer, size, False, True)
    if n < 0:
        raise Refused("llama.cpp cannot write these tokens as text", 500)
    return buffer.raw[:n].decode("utf-8", errors="replace")
